// SPDX-License-Identifier: Apache-2.0
// The page of a report: sections out of the figures, the explorer, and, where it is served live, their refreshing.

let figures = JSON.parse(document.getElementById("figures").textContent);
const main = document.getElementById("main");
const state = {
  split: "train",
  curve: "tasks",
  tool: null,
  toolsShown: "used",
  group: null,
  order: "session",
  sort: "worth",
  page: 0,
  flow: "cluster",
  filter: { outcome: "", tag: "", tool: "", source: "", from: "", to: "", words: "", uids: null },
};
const PER_PAGE = 30;
const ALARMS = 12; // shown at once
const TAGS = {
  hacked: "caught cheat",
  failed: "a call failed",
  unscored: "unscored group",
  flat: "no variance",
  split: "both ends of the scale",
  low: "all low",
  high: "all high",
  disagree: "tools disagree",
  alarm: "named by an alarm",
  repeated: "paid for many prompts",
};
const toolOf = (digest) => figures.tools.find((tool) => tool.digest === digest);
const clusterOf = (id) => (Object.hasOwn(figures.clusters, id) ? figures.clusters[id] : id);
const say = (text) => {
  document.getElementById("said").textContent = text;
};
const go = (id) => {
  const el = document.getElementById(id);
  if (el) {
    el.scrollIntoView({ block: "start" });
    const head = el.querySelector("h2, h3");
    if (head) {
      head.tabIndex = -1;
      head.focus({ preventScroll: true });
    }
  }
};

function segmented(label, key, choices, now, choose) {
  return h(
    "div",
    { class: "seg", role: "group", "aria-label": label },
    choices.map(([value, name]) =>
      h(
        "button",
        {
          type: "button",
          "data-key": `${key} ${value}`,
          "aria-pressed": String(value === now),
          onclick: () => choose(value),
        },
        name,
      ),
    ),
  );
}
function select(label, key, choices, now, choose) {
  return h(
    "label",
    { class: label === "Order" ? "field wide" : "field" },
    label,
    h(
      "select",
      { "data-key": key, onchange: (event) => choose(event.target.value) },
      choices.map(([value, name]) => h("option", { value, selected: value === now }, plain(name))),
    ),
  );
}
function section(id, title, lead, ...kids) {
  return h(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    h("div", { class: "head" }, h("h2", { id: `${id}-title` }, title), lead && h("p", { class: "lead" }, lead)),
    kids,
  );
}
const card = (title, ...kids) => h("div", { class: "card" }, title && h("h3", {}, title), kids);
const chip = (text, cls) => h("span", { class: `chip ${cls || ""}` }, text);
// Foreign text in a paragraph; what looks like code keeps its columns
const CODE =
  /```|^[ \t]*(def|class|import|from|return|for|if|while|#include|function|const|let|var|public|assert)\b.*[:;({=]/m;
const paragraph = (text) => h("p", { class: CODE.test(text) ? "text mono" : "text" }, foreign(text));
const stateChip = (tool) => chip(tool.state.replace("_", " "), tool.state);

// --- Overview ---

function overview() {
  const splits = Object.keys(figures.curves);
  if (!splits.includes(state.split)) state.split = splits[0];
  const curves = figures.curves[state.split],
    { outcomes, groups, all } = curves;
  const total = sum(all.n),
    many = sum(groups.many);
  const quarter = Math.max(1, Math.floor(curves.steps.length / 4));
  const mean = (from, to) => {
    let a = 0,
      b = 0;
    for (let k = from; k < to; k++) {
      a += (all.mean[k] || 0) * all.scored[k];
      b += all.scored[k];
    }
    return b ? a / b : null;
  };
  const before = mean(0, quarter),
    after = mean(curves.steps.length - quarter, curves.steps.length);
  const share = (values, of) => values.map((value, at) => (of[at] ? value / of[at] : null));
  const change = before !== null && after !== null && curves.steps.length > 3 ? after - before : null;
  const tile = (name, big, sub, values) =>
    h(
      "div",
      { class: "tile" },
      h("dt", {}, name),
      h("dd", {}, h("div", { class: "big" }, big), sub && h("div", { class: "sub" }, sub), values && spark(values)),
    );
  const tiles = h(
    "dl",
    { class: "tiles" },
    tile(
      "Reward, last quarter",
      fmt.v(after),
      change === null
        ? "mean of the scored"
        : [
            h(
              "span",
              { class: change >= 0 ? "up" : "down" },
              `${change >= 0 ? "▲ +" : "▼ −"}${Math.abs(change).toFixed(3)}`,
            ),
            " on the first",
          ],
      all.mean,
    ),
    tile(
      "Steps",
      fmt.n(figures.run.splits[state.split].steps),
      stepsOf([figures.run.splits[state.split].first, figures.run.splits[state.split].last]),
    ),
    tile("Responses", fmt.n(total), `${fmt.n(sum(groups.groups))} groups`),
    tile(
      "Scored",
      fmt.p(sum(outcomes.scored) / total),
      `${fmt.n(sum(outcomes.scored))} responses`,
      share(outcomes.scored, all.n),
    ),
    tile(
      "Failed",
      fmt.p(sum(outcomes.failed) / total),
      `${fmt.n(sum(outcomes.failed))}: our fault, no score`,
      share(outcomes.failed, all.n),
    ),
    tile(
      "Abstained",
      fmt.p(sum(outcomes.abstained) / total),
      `${fmt.n(sum(outcomes.abstained))}: no tool's business`,
      share(outcomes.abstained, all.n),
    ),
    tile(
      "Hacked",
      fmt.p(sum(outcomes.hacked) / total),
      `${fmt.n(sum(outcomes.hacked))} caught cheats`,
      share(outcomes.hacked, all.n),
    ),
    many > 0 &&
      tile(
        "No variance",
        fmt.p(sum(groups.flat) / many),
        "of groups: nothing to learn",
        share(groups.flat, groups.many),
      ),
  );
  const choices = [
    ["tasks", "by task"],
    ["routes", "by tool"],
    ["outcomes", "outcomes"],
    ["groups", "groups"],
  ];
  const events = figures.events.filter((event) =>
    ["shadow", "live", "retired", "quarantined", "rolled_back"].includes(event.event),
  );
  const points = curves.steps;
  let chart;
  if (state.curve === "outcomes")
    chart = stack({ label: "Outcomes of responses", points, parts: outcomes, height: 270 });
  else if (state.curve === "groups")
    chart = lines({
      id: "groups",
      label: "Groups of responses",
      points,
      format: fmt.p,
      low: 0,
      high: 1,
      height: 290,
      events,
      series: [
        { name: "groups without variance", values: share(groups.flat, groups.many), weights: groups.many },
        { name: "unscored responses", values: all.unscored, weights: all.n },
      ],
    });
  else
    chart = lines({
      id: state.curve,
      label: state.curve === "tasks" ? "Mean reward by task" : "Mean reward by tool",
      points,
      format: fmt.v,
      low: 0,
      high: 1,
      height: 310,
      events,
      series: curves[state.curve].map((line) => ({
        name: line.name === "-" ? "(no tool)" : line.name,
        values: line.mean,
        weights: line.scored,
      })),
    });
  const marks =
    events.length > 0 &&
    state.curve !== "outcomes" &&
    h(
      "div",
      { class: "legend" },
      [
        ["e-live", "live"],
        ["e-shadow", "shadow"],
        ["e-bad", "quarantined, rolled back"],
        ["e-note", "retired"],
      ]
        .filter(([cls]) => events.some((event) => KIND_OF_EVENT(event.event) === cls))
        .map(([cls, name]) =>
          h(
            "span",
            { class: "key" },
            s("svg", { "aria-hidden": "true" }, s("path", { class: cls, d: "M11 0l5 5-5 5-5-5z" })),
            name,
          ),
        ),
    );
  return section(
    "overview",
    "Overview",
    null,
    tiles,
    h(
      "div",
      { class: "card" },
      h(
        "div",
        { class: "bar" },
        segmented("What is shown", "curve", choices, state.curve, (value) => {
          state.curve = value;
          again("overview");
        }),
        splits.length > 1 &&
          segmented(
            "Training or validation",
            "split",
            [
              ["train", "training"],
              ["val", "validation"],
            ],
            state.split,
            (value) => {
              state.split = value;
              again("overview");
            },
          ),
      ),
      chart,
      marks,
      figures.events.length > 0 &&
        later(`What happened in the library (${figures.events.length})`, () => eventTable(figures.events, true)),
    ),
    figures.length.points.some((value) => value !== null) &&
      h(
        "div",
        { class: "grid two gap" },
        card(
          "Length of responses",
          lines({
            id: "length",
            label: "Mean characters of a response (drawn groups)",
            points: figures.curves.train ? figures.curves.train.steps : points,
            format: fmt.n,
            low: 0,
            height: 190,
            series: [{ name: "characters", values: figures.length.points }],
          }),
        ),
        card(
          "Does length pay?",
          h(
            "p",
            { class: "lead" },
            "Correlation of length and reward within groups: what GRPO sees. Near 1, longer is better whatever is said.",
          ),
          table(
            "By task",
            [["task"], ["correlation", true], ["responses", true]],
            figures.length.tasks.map((task) => [
              bdi(task.name),
              task.r === null ? "–" : (task.r > 0 ? "+" : "") + task.r.toFixed(2),
              fmt.n(task.n),
            ]),
          ),
        ),
      ),
  );
}
function eventTable(events, named) {
  return table(
    "Events, the latest first",
    [["step"], ...(named ? [["tool"]] : []), ["event"], ["by"], ["why"], ["time"]],
    [...events]
      .reverse()
      .map((event) => [
        event.step,
        ...(named ? [toolLink(event.digest, event.tool)] : []),
        chip(event.event.replace("_", " "), event.event),
        bdi(event.by),
        h("span", { class: "text" }, foreign(event.why)),
        event.time.replace("T", " "),
      ]),
    true,
  );
}
function toolLink(digest, name) {
  return toolOf(digest)
    ? h("button", { type: "button", class: "link", onclick: () => openTool(digest) }, bdi(name))
    : bdi(name);
}

// --- Alarms ---

function alarmSection() {
  const shown = (wanted) =>
    figures.samples.some(
      (group) =>
        (!wanted.tag || group.tags.includes(wanted.tag)) &&
        (!wanted.source || group.source === wanted.source) &&
        (!wanted.uids || wanted.uids.includes(group.uid)),
    );
  const look = (alarm) => {
    const wanted = alarm.tag
      ? { tag: alarm.tag }
      : alarm.task
        ? { source: alarm.task }
        : alarm.uids && alarm.uids.length
          ? { uids: alarm.uids }
          : null;
    return h(
      "div",
      { class: "looks" },
      wanted &&
        shown(wanted) &&
        h("button", { type: "button", class: "open", onclick: () => openSamples(wanted) }, "Show samples"),
      alarm.tool &&
        toolOf(alarm.tool) &&
        h("button", { type: "button", class: "open", onclick: () => openTool(alarm.tool) }, "Open the tool"),
    );
  };
  const words = { bad: "serious", warn: "worth a look", note: "to know" };
  const item = (alarm) =>
    h(
      "li",
      { class: `alarm ${alarm.level}` },
      chip(words[alarm.level], alarm.level === "note" ? "" : alarm.level),
      h(
        "div",
        {},
        h("h3", {}, bdi(alarm.title)),
        h("p", {}, bdi(alarm.text)),
        alarm.figures &&
          alarm.figures.length > 0 &&
          h(
            "dl",
            { class: "evidence", "aria-label": "Evidence" },
            alarm.figures.map(([name, value]) =>
              h("div", {}, h("dt", {}, plain(name).replaceAll("_", " ")), h("dd", {}, fmt.g(value))),
            ),
          ),
      ),
      look(alarm),
    );
  const rest = figures.alarms.slice(ALARMS);
  return section(
    "alarms",
    "Alarms",
    "Signs of a broken or a cheated reward, the gravest first. A sign is no proof.",
    figures.alarms.length
      ? [
          h("ul", {}, figures.alarms.slice(0, ALARMS).map(item)),
          rest.length > 0 &&
            h(
              "div",
              { class: "gap" },
              later(`${rest.length} more`, () => h("ul", {}, rest.map(item))),
            ),
        ]
      : card(null, h("p", { class: "empty-state" }, "Nothing stands out.")),
  );
}

// --- Routing ---

function routing() {
  const named = figures.flow.some((flow) => flow.cluster !== flow.kind);
  const by = named ? state.flow : "kind";
  const name = (flow) => (by === "cluster" ? clusterOf(flow.cluster) : flow.kind);
  const summed = new Map();
  for (const flow of figures.flow) {
    const key = JSON.stringify([flow.source, name(flow), flow.kind, flow.route]);
    const had = summed.get(key) || { source: flow.source, group: name(flow), kind: flow.kind, route: flow.route };
    const scored = (had.scored || 0) + flow.scored;
    had.mean = scored ? ((had.mean || 0) * (had.scored || 0) + (flow.mean || 0) * flow.scored) / scored : null;
    summed.set(key, Object.assign(had, { n: (had.n || 0) + flow.n, scored }));
  }
  const flows = [...summed.values()].sort((a, b) => b.n - a.n),
    names = (of) => [...new Set(flows.map(of))];
  const sources = names((flow) => JSON.stringify([flow.source, flow.group, flow.kind])),
    routes = names((flow) => flow.route);
  const most = Math.max(...flows.map((flow) => flow.n), 1);
  const matrix = h(
    "div",
    { class: "scroll tall", tabindex: 0, role: "group", "aria-label": "Data and tools" },
    h(
      "table",
      { class: "matrix" },
      h(
        "caption",
        {},
        `Responses, and their mean reward, by data source, ${by === "cluster" ? "cluster of alike prompts" : "kind of query"}, and tools`,
      ),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "data source"),
          by === "cluster" && h("th", { scope: "col" }, "cluster"),
          h("th", { scope: "col" }, "kind"),
          routes.map((route) => h("th", { scope: "col" }, bdi(route === "-" ? "(no tool)" : route))),
        ),
      ),
      h(
        "tbody",
        {},
        sources.map((key) => {
          const [source, group, kind] = JSON.parse(key);
          return h(
            "tr",
            {},
            h("th", { scope: "row", title: plain(source) }, bdi(source)),
            by === "cluster" && h("td", { class: "name" }, bdi(group)),
            h("td", {}, chip(kind)),
            routes.map((route) => {
              const flow = flows.find(
                (one) => one.source === source && one.group === group && one.kind === kind && one.route === route,
              );
              if (!flow) return h("td", { class: "empty" }, "·");
              const cell = h("td", { class: "full" }, fmt.n(flow.n), h("small", {}, fmt.v(flow.mean)));
              cell.style.background = `color-mix(in oklab, var(--accent) ${Math.round(8 + 26 * Math.sqrt(flow.n / most))}%, var(--card))`;
              return cell;
            }),
          );
        }),
      ),
    ),
  );
  return section(
    "routing",
    "Routing",
    "Which data went to which tools, training and validation together.",
    h(
      "div",
      { class: "card" },
      named &&
        h(
          "div",
          { class: "bar" },
          segmented(
            "What stands in the middle",
            "flow",
            [
              ["cluster", "by cluster"],
              ["kind", "by kind of query"],
            ],
            by,
            (value) => {
              state.flow = value;
              again("routing");
            },
          ),
        ),
      flows.length
        ? [sankey(flows), h("div", { class: "gap" }, matrix)]
        : h("p", { class: "empty-state" }, "No routes in the ledger."),
    ),
    figures.advice.length > 0 &&
      h(
        "div",
        { class: "gap" },
        card(
          "What an LLM advised",
          h(
            "p",
            { class: "lead" },
            "It counts where evidence is thin, from the step on; exams outweigh it as they come.",
          ),
          table(
            "Advice on routes, the latest first",
            [["from step"], ["cluster"], ["tool"], ["why"], ["by"]],
            figures.advice.map((one) => [
              one.step,
              [bdi(clusterOf(one.cluster)), one.single ? " (one prompt of it)" : ""],
              toolLink(one.digest, toolOf(one.digest) ? toolOf(one.digest).name : one.digest),
              h("span", { class: "text" }, foreign(one.reason)),
              bdi(one.by),
            ]),
            true,
          ),
        ),
      ),
  );
}

// --- Tools ---

const shownTools = () =>
  figures.tools
    .filter(
      (tool) =>
        state.toolsShown === "all" ||
        (state.toolsShown === "used" ? tool.use || tool.shadow : ["live", "shadow"].includes(tool.state)),
    )
    .sort((a, b) => (b.use ? b.use.calls : 0) - (a.use ? a.use.calls : 0) || (a.name < b.name ? -1 : 1));
function toolSection() {
  let shown = shownTools();
  if (!shown.length) {
    state.toolsShown = "all";
    shown = shownTools();
  }
  if (!toolOf(state.tool)) state.tool = shown[0] ? shown[0].digest : null;
  const counts = {
    used: figures.tools.filter((tool) => tool.use || tool.shadow).length,
    standing: figures.tools.filter((tool) => ["live", "shadow"].includes(tool.state)).length,
    all: figures.tools.length,
  };
  const list = table(
    "Tools",
    [
      ["tool"],
      ["state"],
      ["kind"],
      ["calls", true],
      ["mean", true],
      ["outcomes"],
      ["p50", true],
      ["p95", true],
      ["canaries"],
    ],
    shown.map((tool) => {
      const use = tool.use || {},
        flipped = tool.canaries.filter((one) => one.flipped !== null).length;
      return h(
        "tr",
        { "aria-current": tool.digest === state.tool ? "true" : null },
        h(
          "th",
          { scope: "row" },
          h(
            "button",
            { type: "button", class: "link", "data-key": `tool ${tool.digest}`, onclick: () => openTool(tool.digest) },
            bdi(tool.name),
          ),
          " ",
          h("span", { class: "mono lead" }, tool.digest.slice(0, 6)),
        ),
        h("td", {}, stateChip(tool)),
        h("td", {}, tool.kind.replace("_", " ")),
        h("td", { class: "num" }, fmt.n(use.calls)),
        h("td", { class: "num" }, fmt.v(use.mean ?? null)),
        h("td", {}, use.outcomes ? meter(use.outcomes) : "–"),
        h("td", { class: "num" }, fmt.s(use.p50)),
        h("td", { class: "num" }, fmt.s(use.p95)),
        h(
          "td",
          {},
          !tool.canaries.length
            ? "–"
            : flipped
              ? chip(`${flipped} flipped`, "bad")
              : chip(`${tool.canaries.length} hold`, "good"),
        ),
      );
    }),
    true,
  );
  return section(
    "tools",
    "Tools",
    figures.run.sampled < figures.run.rows
      ? `Calls and times are from ${fmt.n(figures.run.sampled)} sampled rows, scaled to ${fmt.n(figures.run.rows)}.`
      : null,
    h(
      "div",
      { class: "card" },
      h(
        "div",
        { class: "bar" },
        segmented(
          "Which tools",
          "tools",
          [
            ["used", `used (${counts.used})`],
            ["standing", `live and shadow (${counts.standing})`],
            ["all", `all (${counts.all}${figures.tools_left_out ? `, ${figures.tools_left_out} left out` : ""})`],
          ],
          state.toolsShown,
          (value) => {
            state.toolsShown = value;
            again("tools");
          },
        ),
      ),
      list,
    ),
    h("div", { id: "tool", class: "gap" }, state.tool && toolPage(toolOf(state.tool))),
  );
}
function openTool(digest) {
  state.tool = digest;
  if (!shownTools().some((tool) => tool.digest === digest)) state.toolsShown = "all";
  again("tools");
  go("tool");
  say(`${plain(toolOf(digest).name)} is shown`);
}
function toolPage(tool) {
  const use = tool.use,
    points = figures.curves.train ? figures.curves.train.steps : [];
  const facts = h(
    "dl",
    { class: "facts" },
    [
      ["checks", tool.kinds.join(", ") || "–"],
      ["reference", tool.needs_reference === undefined ? null : tool.needs_reference ? "needed" : "not needed"],
      [
        "range",
        tool.low === undefined ? null : `${fmt.g(tool.low)} to ${fmt.g(tool.high)}${tool.gate ? ", a gate" : ""}`,
      ],
      ["deadline", tool.timeout_s === undefined ? null : `${fmt.g(tool.timeout_s)} s${tool.boxed ? ", in a box" : ""}`],
      ["runs", tool.target],
      ["made by", tool.origin],
      ["digest", tool.digest],
    ]
      .filter(([, value]) => value)
      .map(([name, value]) => [h("dt", {}, name), h("dd", {}, bdi(value))]),
  );
  const about = h(
    "div",
    { class: "card" },
    h(
      "div",
      { class: "head" },
      h("h3", {}, bdi(tool.name)),
      h(
        "div",
        { class: "chips" },
        stateChip(tool),
        chip(tool.kind.replace("_", " ")),
        tool.card && chip(`exam: ${tool.card.verdict}`, tool.card.verdict),
      ),
    ),
    tool.description && h("p", { class: "text" }, foreign(tool.description)),
    tool.why &&
      h(
        "p",
        { class: "lead gap" },
        tool.since === null ? "" : `${tool.state.replace("_", " ")} since step ${tool.since}: `,
        bdi(tool.why),
      ),
    tool.damaged && h("p", { class: "down gap" }, foreign(tool.damaged)),
    h("div", { class: "gap" }, facts),
    tool.misses.length > 0 &&
      later(`What it is known to miss (${tool.misses.length})`, () =>
        h(
          "ul",
          {},
          tool.misses.map((missed) => h("li", { class: "text" }, "– ", foreign(missed))),
        ),
      ),
    tool.serving &&
      !tool.checks.length &&
      later("How it is served", () => h("pre", { class: "text source" }, foreign(tool.serving))),
  );
  const history = card(
    "History",
    tool.events.length ? eventTable(tool.events, false) : h("p", { class: "gone" }, "The library says nothing of it."),
  );
  const cards = [about];
  if (tool.checks.length)
    cards.push(
      card(
        "What the judge is asked",
        h(
          "p",
          { class: "lead" },
          "Its value is the weighted share of yes. A question that gets one answer always says nothing.",
        ),
        table(
          "Questions of the rubric",
          [["question"], ["weight", true], ["yes", true]],
          tool.checks.map((one) => [
            h("span", { class: "text" }, foreign(one.question)),
            fmt.g(one.weight),
            fmt.p(one.yes),
          ]),
        ),
      ),
    );
  if (use && points.length) {
    cards.push(
      card(
        "Outcomes over steps",
        h(
          "p",
          { class: "lead" },
          `${fmt.n(use.calls)} calls · p50 ${fmt.s(use.p50)} · p95 ${fmt.s(use.p95)} · ${fmt.s(use.seconds)} in all${use.tokens === null ? "" : ` · ${fmt.n(use.tokens)} tokens`}${use.dollars ? ` · ${fmt.d(use.dollars)}` : ""}`,
        ),
        stack({ label: `Outcomes of ${tool.name}`, points, parts: use.points, height: 150 }),
      ),
    );
    if (use.means.some((value) => value !== null))
      cards.push(
        card(
          "Mean value over steps",
          lines({
            id: `mean ${tool.digest}`,
            label: `Mean value of ${tool.name}`,
            points,
            format: fmt.v,
            low: 0,
            high: 1,
            height: 190,
            events: tool.events
              .filter((event) => !(event.step === 0 && ["builtin", "user"].includes(event.by)))
              .map((event) => ({ ...event, tool: tool.name })),
            series: [
              { name: "with a say", values: use.means },
              ...(tool.shadow ? [{ name: "in the shadow", values: tool.shadow.means }] : []),
            ],
          }),
        ),
      );
    cards.push(
      card(
        "Values",
        h(
          "p",
          { class: "lead" },
          `Mean ${fmt.v(use.mean)}. A tool with two peaks decides, one with a single peak says little.`,
        ),
        bars({
          label: `Values of ${tool.name}`,
          axis: [0, 1],
          height: 170,
          bars: use.histogram.map((value, at) => ({
            value,
            name: `${(at / 20).toFixed(2)} to ${((at + 1) / 20).toFixed(2)}`,
          })),
        }),
      ),
    );
    if (use.raws && use.raws.bins.length > 1 && (use.raws.low < -1e-9 || use.raws.high > 1 + 1e-9)) {
      const step = (use.raws.high - use.raws.low) / use.raws.bins.length;
      cards.push(
        card(
          "Raw scores",
          bars({
            label: `Raw scores of ${tool.name}`,
            axis: [use.raws.low, use.raws.high],
            height: 170,
            bars: use.raws.bins.map((value, at) => ({
              value,
              cls: "s2",
              name: `${fmt.g(use.raws.low + at * step)} to ${fmt.g(use.raws.low + (at + 1) * step)}`,
            })),
          }),
        ),
      );
    }
    if (use.reasons.length)
      cards.push(
        card(
          "Why not scored",
          table(
            "The most frequent reasons, in the sampled rows",
            [["outcome"], ["reason"], ["times", true]],
            use.reasons.map((one) => [
              chip(one.outcome, one.outcome),
              h("span", { class: "text" }, foreign(one.reason)),
              fmt.n(one.n),
            ]),
          ),
        ),
      );
  }
  if (tool.calibration)
    cards.push(
      card(
        "Calibration",
        h(
          "p",
          { class: "lead" },
          tool.calibration.method === "identity"
            ? "Linear: its values are taken as they are."
            : `Learned (${tool.calibration.method}) from ${fmt.n(tool.calibration.good)} right and ${fmt.n(tool.calibration.bad)} wrong answers; ranks ${fmt.p(tool.calibration.ranking)} of pairs rightly${tool.calibration.lower_is_better ? "; lower is better" : ""}.`,
        ),
        (tool.calibration.method !== "identity" || tool.low !== 0 || tool.high !== 1) &&
          curve({
            label: `Calibration of ${tool.name}`,
            points: tool.calibration.points,
            xName: "raw score",
            yName: "value",
          }),
      ),
    );
  if (tool.shadow) {
    const shadow = tool.shadow;
    cards.push(
      card(
        "In the shadow",
        h(
          "dl",
          { class: "facts" },
          [
            ["responses", fmt.n(shadow.n)],
            ["steps", `${shadow.first} to ${shadow.last}`],
            ["failed", fmt.n(shadow.outcomes.failed)],
            ["time", fmt.s(shadow.seconds)],
            [
              "ranks like the tools in place",
              shadow.pairs
                ? `${fmt.p(shadow.alike / shadow.pairs)} of ${fmt.n(shadow.pairs)} pairs (drawn groups; 50 % is chance)`
                : "no pair that both rank",
            ],
          ].map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
        ),
        !use &&
          points.length > 0 &&
          lines({
            id: `shadow ${tool.digest}`,
            label: `Mean value of ${tool.name} in the shadow`,
            points,
            format: fmt.v,
            low: 0,
            high: 1,
            height: 170,
            series: [{ name: "in the shadow", values: shadow.means }],
          }),
      ),
    );
  }
  if (tool.canaries.length)
    cards.push(
      card(
        "Canaries",
        h("p", { class: "lead" }, "Answers whose score is known, scored again during the run."),
        table(
          "Canaries",
          [["canary"], ["must get", true], ["latest", true], ["times", true], ["steps"], [""]],
          tool.canaries.map((one) => [
            h("span", { class: "mono" }, foreign(one.canary)),
            fmt.v(one.wanted),
            fmt.v(one.latest),
            fmt.n(one.n),
            `${one.first} to ${one.last}`,
            one.flipped === null
              ? chip("holds", "good")
              : chip(`flipped at step ${one.flipped}: ${fmt.v(one.got)}`, "bad"),
          ]),
          true,
        ),
      ),
    );
  const wide = [history];
  if (tool.card) wide.unshift(examCard(tool));
  const source = figures.sources[tool.source];
  if (source !== undefined || tool.source || ["rule", "verifier"].includes(tool.kind))
    wide.push(
      card(
        "Source",
        source === undefined
          ? h("p", { class: "gone" }, `Not in this file; see library/tools/${tool.digest}/source.py.`)
          : later(`${fmt.n(source.split("\n").length)} lines`, () =>
              h("pre", { class: "text source", tabindex: 0, role: "group", "aria-label": "Source" }, foreign(source)),
            ),
      ),
    );
  return [h("div", { class: "grid two" }, cards), h("div", { class: "grid gap" }, wide)];
}
function examCard(tool) {
  const exam = tool.card;
  const limit = (figure) => (figure.limit === null ? "" : `${figure.least ? "≥" : "≤"} ${fmt.g(figure.limit)}`);
  return h(
    "div",
    { class: "card" },
    h(
      "div",
      { class: "head" },
      h("h3", {}, "Exam"),
      chip(exam.verdict, exam.verdict),
      h("span", { class: "lead" }, `${fmt.n(exam.cases)} cases, ${fmt.n(exam.sealed)} of them sealed`),
    ),
    exam.reasons.length > 0 &&
      h(
        "ul",
        {},
        exam.reasons.map((reason) => h("li", { class: "text" }, "– ", foreign(reason))),
      ),
    (exam.admitted_for.length > 0 || exam.unproven.length > 0) &&
      h(
        "p",
        { class: "lead" },
        exam.admitted_for.length ? `Admitted for ${exam.admitted_for.map(plain).join(", ")}. ` : "",
        exam.unproven.length ? `Not enough evidence for ${exam.unproven.map(plain).join(", ")}.` : "",
      ),
    exam.figures.length > 0 &&
      h(
        "div",
        { class: "gap" },
        table(
          "Figures",
          [["kind"], ["figure"], ["value", true], ["limit", true], ["cases", true], [""]],
          exam.figures.map((figure) => [
            figure.kind,
            bdi(figure.meaning + (figure.note ? ` (${figure.note})` : "")),
            fmt.g(figure.value),
            limit(figure),
            figure.cases || "",
            figure.missed
              ? chip("missed", "bad")
              : figure.limit !== null && figure.value !== null
                ? chip("reached", "good")
                : "",
          ]),
          true,
        ),
      ),
    exam.sorts.length > 0 &&
      later(`Sorts of cases (${exam.sorts.length})`, () =>
        table(
          "Sorts of cases",
          [["sort"], ["cases", true], ["right", true]],
          exam.sorts.map((one) => [bdi(one.sort), fmt.n(one.cases), fmt.n(one.right)]),
          true,
        ),
      ),
    exam.failing.length > 0 &&
      later(`Failing cases (${exam.failing.length} of ${fmt.n(exam.failed_cases)})`, () =>
        h(
          "div",
          { class: "grid two" },
          exam.failing.map((one) =>
            h(
              "div",
              { class: "card" },
              h("h4", {}, bdi(`${one.id} · ${one.sort} · ${one.origin}`)),
              h(
                "p",
                {},
                "said ",
                h("b", {}, one.value === null ? plain(one.outcome) : fmt.v(one.value)),
                ", wanted ",
                bdi(one.wanted),
              ),
              h(
                "dl",
                { class: "facts" },
                ["prompt", "reference", "response", "reason"]
                  .filter((name) => one[name])
                  .map((name) => [h("dt", {}, name), h("dd", { class: "text" }, foreign(one[name]))]),
              ),
            ),
          ),
        ),
      ),
  );
}

// --- Samples ---

const outcomesOf = (group) => new Set(group.responses.map((one) => one.outcome));
const toolsOf = (group) =>
  new Set(group.responses.flatMap((one) => [...one.parts, ...one.shadows].map((part) => part.tool)));
const wordsOf = (group) =>
  (group.words ??= [
    group.prompt && group.prompt.turns.map((turn) => turn.text).join(" "),
    group.prompt && group.prompt.reference,
    ...group.responses.map((one) => `${one.text || ""} ${one.reason}`),
  ]
    .join(" ")
    .toLowerCase());
function matching() {
  const { outcome, tag, tool, source, from, to, words, uids } = state.filter;
  const wanted = words.trim().toLowerCase();
  return figures.samples
    .filter(
      (group) =>
        (!outcome || outcomesOf(group).has(outcome)) &&
        (!tag || group.tags.includes(tag)) &&
        (!uids || uids.includes(group.uid)) &&
        (!tool || toolsOf(group).has(tool)) &&
        (!source || group.source === source) &&
        (from === "" || group.step >= Number(from)) &&
        (to === "" || group.step <= Number(to)) &&
        (!wanted || wordsOf(group).includes(wanted)),
    )
    .sort(SORTS[state.sort][1]);
}
const SORTS = {
  worth: ["worth a look first", (a, b) => a.rank - b.rank],
  step: ["by step", (a, b) => a.step - b.step || a.rank - b.rank],
  low: ["lowest reward first", (a, b) => (a.mean ?? 2) - (b.mean ?? 2) || a.rank - b.rank],
  high: ["highest reward first", (a, b) => (b.mean ?? -1) - (a.mean ?? -1) || a.rank - b.rank],
  spread: [
    "widest spread first",
    (a, b) => (b.high ?? 0) - (b.low ?? 0) - ((a.high ?? 0) - (a.low ?? 0)) || a.rank - b.rank,
  ],
};
const keyOf = (group) => `${group.attempt} ${group.uid} ${group.step}`;
function openSamples(filter) {
  state.filter = { outcome: "", tag: "", tool: "", source: "", from: "", to: "", words: "", uids: null, ...filter };
  state.page = 0;
  state.group = null;
  again("samples");
  go("samples");
}
function sampleSection() {
  const set = (name) => (value) => {
    state.filter[name] = value;
    state.page = 0;
    state.group = null;
    narrowed();
  };
  const counted = (of) => {
    const found = new Map();
    for (const group of figures.samples) for (const one of of(group)) found.set(one, (found.get(one) || 0) + 1);
    return [...found].sort((a, b) => (a[0] < b[0] ? -1 : 1)).map(([name, n]) => [name, `${name} (${n})`]);
  };
  const tags = counted((group) => group.tags).map(([tag, name]) => [tag, (TAGS[tag] || tag) + name.slice(tag.length)]);
  const number = (label, name) =>
    h(
      "label",
      { class: "field" },
      label,
      h("input", {
        type: "number",
        min: 0,
        "data-key": `filter ${name}`,
        value: state.filter[name],
        oninput: (event) => set(name)(event.target.value),
      }),
    );
  const filters = h(
    "div",
    { class: "bar explore", role: "search", "aria-label": "Filter the samples" },
    select("Shown for", "filter tag", [["", "any reason"], ...tags], state.filter.tag, set("tag")),
    select(
      "With outcome",
      "filter outcome",
      [["", "any"], ...counted(outcomesOf)],
      state.filter.outcome,
      set("outcome"),
    ),
    select(
      "Task",
      "filter source",
      [["", "any"], ...counted((group) => [group.source])],
      state.filter.source,
      set("source"),
    ),
    select("Tool", "filter tool", [["", "any"], ...counted(toolsOf)], state.filter.tool, set("tool")),
    select(
      "Order",
      "filter sort",
      Object.entries(SORTS).map(([value, [name]]) => [value, name]),
      state.sort,
      (value) => {
        state.sort = value;
        state.page = 0;
        state.group = null;
        narrowed();
      },
    ),
    number("From step", "from"),
    number("To step", "to"),
    h(
      "label",
      { class: "field" },
      "Words",
      h("input", {
        type: "search",
        "data-key": "filter words",
        value: state.filter.words,
        oninput: (event) => set("words")(event.target.value),
      }),
    ),
    h(
      "button",
      { type: "button", class: "quiet", "data-key": "filter clear", onclick: () => openSamples({}) },
      state.filter.uids ? "Clear: only an alarm's groups are shown" : "Clear",
    ),
  );
  return section(
    "samples",
    "Samples",
    figures.samples.length
      ? `${fmt.n(figures.samples.length)} groups: those worth a look, and some that were drawn. ${figures.run.texts ? "" : "This run kept no texts (or they were left out): scores and reasons only."}`
      : null,
    figures.samples.length
      ? [
          filters,
          h(
            "div",
            { class: "explorer" },
            h("div", { id: "list" }, sampleList()),
            h("div", { id: "group" }, sampleGroup()),
          ),
        ]
      : card(null, h("p", { class: "empty-state" }, "No groups were asked for.")),
  );
}
function narrowed() {
  document.getElementById("list").replaceChildren(...[sampleList()].flat());
  document.getElementById("group").replaceChildren(...[sampleGroup()].flat());
  say(`${matching().length} groups`);
}
function sampleList() {
  const found = matching(),
    pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  const at = found.findIndex((group) => keyOf(group) === state.group);
  state.page = at < 0 ? Math.min(state.page, pages - 1) : Math.floor(at / PER_PAGE);
  if (at < 0) state.group = found.length ? keyOf(found[state.page * PER_PAGE]) : null;
  const shown = found.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
  if (!found.length) return h("div", { class: "card" }, h("p", { class: "empty-state" }, "No group is like that."));
  const turn = (by) => () => {
    state.page += by;
    state.group = null;
    narrowed();
  };
  const move = (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const items = [...event.currentTarget.querySelectorAll(".item")],
      at = items.indexOf(document.activeElement);
    const next = items[Math.min(items.length - 1, Math.max(0, at + by))];
    if (next) next.focus();
  };
  return h(
    "div",
    { class: "card list" },
    h(
      "ul",
      { "aria-label": "Groups of responses", onkeydown: move },
      shown.map((group) =>
        h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              class: "item",
              "data-key": `group ${keyOf(group)}`,
              "aria-current": String(keyOf(group) === state.group),
              onclick: (event) => {
                state.group = keyOf(group);
                for (const item of document.querySelectorAll("#list .item"))
                  item.setAttribute("aria-current", String(item === event.currentTarget));
                document.getElementById("group").replaceChildren(...[sampleGroup()].flat());
                if (window.innerWidth <= 860) go("group");
                say(`Group of step ${group.step} is shown`);
              },
            },
            h(
              "span",
              { class: "first" },
              h("span", {}, group.split === "val" ? "validation, " : "", `step ${group.step} · `, bdi(group.source)),
              h("span", {}, fmt.v(group.mean)),
            ),
            h(
              "span",
              { class: "words" },
              group.prompt && group.prompt.turns.length
                ? foreign(group.prompt.turns[group.prompt.turns.length - 1].text.slice(0, 140))
                : h("span", { class: "gone" }, "text not kept"),
            ),
            dots(group),
          ),
        ),
      ),
    ),
    h(
      "div",
      { class: "page" },
      h("button", { type: "button", "data-key": "page back", disabled: state.page === 0, onclick: turn(-1) }, "Back"),
      h("span", {}, `${state.page + 1} of ${pages} · ${fmt.n(found.length)} groups`),
      h("button", { type: "button", "data-key": "page on", disabled: state.page >= pages - 1, onclick: turn(1) }, "On"),
    ),
  );
}
function dots(group) {
  return h(
    "span",
    {
      class: "dots",
      role: "img",
      "aria-label": group.tags.map((tag) => TAGS[tag] || tag).join(", ") || "drawn at random",
    },
    group.responses.map((one) =>
      s(
        "svg",
        { viewBox: "0 0 12 12", "aria-hidden": "true" },
        s("circle", { class: `fill ${one.outcome}`, cx: 6, cy: 6, r: 5.5, opacity: 0.22 }),
        one.outcome === "scored" && one.value !== null
          ? s("circle", { class: `fill ${one.outcome}`, cx: 6, cy: 6, r: 5.5 * Math.sqrt(one.value) })
          : s("path", { class: `fill ${one.outcome}`, d: one.outcome === "hacked" ? "M6 1l5 10H1z" : "M2 5h8v2H2z" }),
        s("title", {}, `${one.outcome} ${fmt.v(one.value)}`),
      ),
    ),
  );
}
function sampleGroup() {
  const group = figures.samples.find((one) => keyOf(one) === state.group);
  if (!group) return [];
  const prompt = group.prompt;
  const replies = [...group.responses];
  if (state.order === "value") replies.sort((a, b) => (b.value ?? -1) - (a.value ?? -1));
  return h(
    "div",
    { class: "grid" },
    h(
      "div",
      { class: "card" },
      h(
        "div",
        { class: "head" },
        h("h3", {}, group.split === "val" ? "Validation, " : "", `step ${group.step} · `, bdi(group.source)),
        h(
          "div",
          { class: "chips" },
          group.kind && chip(group.kind),
          group.cluster && group.cluster !== group.kind && chip(plain(clusterOf(group.cluster))),
          group.tags.map((tag) =>
            chip(
              TAGS[tag] || tag,
              {
                hacked: "hacked",
                failed: "failed",
                unscored: "warn",
                flat: "warn",
                disagree: "warn",
                repeated: "warn",
                alarm: "warn",
              }[tag],
            ),
          ),
        ),
      ),
      h(
        "p",
        { class: "lead" },
        group.route === "-" ? "No tool fits" : ["Scored by ", h("b", {}, bdi(group.route))],
        group.why && [": ", bdi(group.why)],
        group.attempt > 1 ? ` · start ${group.attempt}` : "",
      ),
      h(
        "div",
        { class: "gap" },
        prompt
          ? [
              prompt.turns_left_out > 0 && h("p", { class: "gone" }, `${prompt.turns_left_out} earlier turns left out`),
              prompt.turns.map((turn) =>
                h(
                  "div",
                  { class: `turn ${turn.role === "user" ? "user" : ""}`, tabindex: turn.text.length > 900 ? 0 : null },
                  h("h4", {}, bdi(turn.role)),
                  paragraph(turn.text),
                ),
              ),
              prompt.reference !== null &&
                h("div", { class: "turn" }, h("h4", {}, "reference"), paragraph(prompt.reference)),
              prompt.extra &&
                later("Further columns of the row", () => h("pre", { class: "text source" }, foreign(prompt.extra))),
            ]
          : h("p", { class: "gone" }, "The text of the prompt is not in the ledger."),
      ),
    ),
    h(
      "div",
      { class: "bar" },
      h(
        "h3",
        {},
        `${group.responses.length < group.n ? `${group.responses.length} of ${group.n}` : group.n} ${group.n === 1 ? "response" : "responses"}`,
      ),
      segmented(
        "Order of the responses",
        "order",
        [
          ["session", "as sampled"],
          ["value", "best first"],
        ],
        state.order,
        (value) => {
          state.order = value;
          narrowed();
          const el = document.querySelector(`[data-key="order ${value}"]`);
          if (el) el.focus();
        },
      ),
    ),
    h(
      "div",
      { class: "replies" },
      replies.map((one) => reply(one)),
    ),
  );
}
function reply(one) {
  const part = (said, shadow) =>
    h(
      "li",
      {},
      h(
        "div",
        { class: "row" },
        h("span", {}, toolLink(said.digest, said.tool), shadow && [" ", chip("shadow", "shadow")]),
        h(
          "span",
          {},
          said.outcome === "scored" ? h("b", {}, fmt.v(said.value)) : chip(said.outcome, said.outcome),
          said.raw !== null && said.raw !== said.value ? ` (raw ${fmt.g(said.raw)})` : "",
          ` · ${fmt.s(said.seconds)}`,
        ),
      ),
      said.reason && h("p", {}, bdi(said.reason)),
      said.details.length > 0 &&
        h("p", {}, said.details.map(([name, value]) => `${plain(name)} ${fmt.g(value)}`).join(" · ")),
    );
  return h(
    "article",
    {
      class: "reply",
      "aria-label": `Response ${one.session + 1}, ${one.outcome}${one.value === null ? "" : ` ${fmt.v(one.value)}`}`,
    },
    h(
      "header",
      {},
      h("b", {}, one.value === null ? "unscored" : fmt.v(one.value)),
      h("span", { class: "chips" }, chip(`#${one.session + 1}`), chip(one.outcome, one.outcome)),
    ),
    h(
      "div",
      { class: "body", tabindex: one.length > 700 ? 0 : null },
      one.text === null
        ? h("p", { class: "gone" }, "The text is not in the ledger.")
        : one.text === ""
          ? h("p", { class: "gone" }, "(empty)")
          : paragraph(one.text),
    ),
    h(
      "div",
      { class: "who" },
      one.length !== null &&
        h(
          "p",
          {},
          `${fmt.n(one.length)} characters`,
          one.sent_as === "value" ? "" : ` · verl got ${fmt.v(one.sent)} (${one.sent_as})`,
        ),
      one.reason && !one.parts.some((said) => said.reason === one.reason) && h("p", {}, bdi(one.reason)),
      h(
        "ul",
        {},
        one.parts.map((said) => part(said, false)),
        one.shadows.map((said) => part(said, true)),
      ),
    ),
  );
}

// --- Costs and the run ---

function costs() {
  const total = sum(figures.costs.map((one) => one.seconds)),
    most = Math.max(...figures.costs.map((one) => one.seconds));
  const told = figures.costs.some((one) => one.tokens !== null && one.tokens !== undefined),
    paid = figures.costs.some((one) => one.dollars);
  return section(
    "costs",
    "Costs",
    "Seconds that tools took, waiting and retries included; they run side by side, so a step waits for less.",
    h(
      "div",
      { class: "card" },
      figures.costs.length
        ? table(
            `${fmt.s(total)} in all${told ? "; tokens of calls that were scored" : ""}`,
            [
              ["tool"],
              [""],
              ["calls", true],
              ["seconds", true],
              ["share", true],
              ["p50", true],
              ["p95", true],
              ...(told ? [["tokens", true]] : []),
              ...(paid ? [["money", true]] : []),
              [""],
            ],
            figures.costs
              .slice(0, 60)
              .map((one) => [
                toolLink(one.digest, one.tool),
                one.how === "shadow" ? chip("shadow", "shadow") : "",
                fmt.n(one.calls),
                fmt.s(one.seconds),
                fmt.p(one.seconds / total),
                fmt.s(one.p50),
                fmt.s(one.p95),
                ...(told ? [fmt.n(one.tokens)] : []),
                ...(paid ? [fmt.d(one.dollars)] : []),
                h(
                  "div",
                  { class: "meter" },
                  s(
                    "svg",
                    { viewBox: "0 0 100 9", preserveAspectRatio: "none", "aria-hidden": "true" },
                    s("rect", { class: "fill s0", width: Math.max(0.5, (100 * one.seconds) / most), height: 9 }),
                  ),
                ),
              ]),
            true,
          )
        : h("p", { class: "empty-state" }, "No tool took any time."),
    ),
    (figures.agents.spent.length > 0 || figures.agents.runs.length > 0) &&
      h("div", { class: "grid gap" }, spentCard(), didCard()),
  );
}
function spentCard() {
  const spent = figures.agents.spent,
    add = (tasks) => ({
      calls: sum(tasks.map((one) => one.calls)),
      read: sum(tasks.map((one) => one.read)),
      written: sum(tasks.map((one) => one.written)),
      dollars: sum(tasks.map((one) => one.dollars)),
      seconds: sum(tasks.map((one) => one.seconds)),
    });
  if (!spent.length) return null;
  const whole = add(spent),
    columns = [
      ["calls", true],
      ["tokens read", true],
      ["written", true],
      ["money", true],
      ["waited", true],
    ];
  const cells = (one) => [
    fmt.n(one.calls),
    fmt.n(one.read),
    fmt.n(one.written),
    fmt.d(one.dollars),
    fmt.s(one.seconds),
  ];
  return card(
    "What the LLM took",
    h(
      "p",
      { class: "lead" },
      `${fmt.n(whole.read + whole.written)} tokens in ${fmt.n(whole.calls)} calls, by the endpoint's own figures: agents and rubrics, those that failed, too. `,
      whole.dollars ? "" : "No prices are configured (rlar.agents.dollars_read, dollars_written).",
    ),
    table(
      "By who asked",
      [["who"], ...columns],
      [
        ...[...new Set(spent.map((one) => one.who))].map((who) => [
          who,
          ...cells(add(spent.filter((one) => one.who === who))),
        ]),
        ["all", ...cells(whole)],
      ],
    ),
    spent.length > 1 &&
      later(`By task (${spent.length})`, () =>
        table(
          "By task, the dearest first",
          [["task"], ["who"], ...columns],
          spent.map((one) => [h("span", { class: "mono" }, foreign(one.task)), one.who, ...cells(one)]),
          true,
        ),
      ),
  );
}
function didCard() {
  const did = figures.agents.runs;
  return (
    did.length > 0 &&
    card(
      "What agents did",
      table(
        "The latest first",
        [["agent"], ["when (UTC)"], ["for"], ["ended"], ["took", true], ["came of it"], ["transcript"]],
        did.map((one) => [
          bdi(one.agent),
          one.time.replace("T", " "),
          bdi(clusterOf(one.gap)),
          chip(plain(one.how), { done: "good", crash: "bad", fault: "bad" }[one.how] || "warn"),
          fmt.s(one.seconds),
          [one.tool && [toolLink(one.digest, one.tool), ": "], h("span", { class: "text" }, foreign(one.reason))],
          h("span", { class: "mono" }, foreign(one.transcript)),
        ]),
        true,
      ),
    )
  );
}
function about() {
  const run = figures.run;
  return section(
    "about",
    "About this run",
    null,
    h(
      "div",
      { class: "card" },
      h(
        "dl",
        { class: "facts" },
        [
          ["ledger", run.place],
          ["rows that count", fmt.n(run.rows)],
          ["groups", fmt.n(run.groups)],
          ["rows read in full", run.sampled < run.rows ? `${fmt.n(run.sampled)}, spread evenly` : "all"],
          ["library", run.library ? "read" : "there is none here: tools are shown as the ledger knows them"],
          ["release", figures.release],
          ["made", figures.made],
        ].map(([name, value]) => [h("dt", {}, name), h("dd", {}, bdi(value))]),
      ),
      h(
        "div",
        { class: "gap" },
        table(
          "Starts of training",
          [["start"], ["when"], ["steps that count"]],
          run.starts.map((start) => [
            start.attempt,
            start.started.replace("T", " ").slice(0, 19),
            start.steps ? stepsOf(start.steps) : "none: a later start trained them again",
          ]),
        ),
      ),
    ),
  );
}

// --- The page ---

const SECTIONS = [
  ["overview", "Overview", overview],
  ["alarms", "Alarms", alarmSection],
  ["routing", "Routing", routing],
  ["tools", "Tools", toolSection],
  ["samples", "Samples", sampleSection],
  ["costs", "Costs", costs],
  ["about", "About", about],
];
function again(...ids) {
  const key = document.activeElement && document.activeElement.getAttribute("data-key");
  for (const [id, , make] of SECTIONS) {
    if (ids.length && !ids.includes(id)) continue;
    const old = document.getElementById(id),
      made = make();
    old ? old.replaceWith(made) : main.append(made);
  }
  if (key)
    for (const el of document.querySelectorAll("[data-key]"))
      if (el.getAttribute("data-key") === key) {
        el.focus({ preventScroll: true });
        break;
      }
}
function navigation() {
  const grave = figures.alarms.filter((alarm) => alarm.level !== "note");
  document
    .getElementById("nav")
    .replaceChildren(
      ...SECTIONS.map(([id, name]) =>
        h(
          "a",
          { href: `#${id}` },
          name,
          id === "alarms" && grave.length > 0 && h("span", { class: `count ${grave[0].level}` }, grave.length),
        ),
      ),
    );
  mark();
}
function mark() {
  const seen = SECTIONS.map(([id]) => id).filter((id) => {
    const el = document.getElementById(id);
    return el && el.getBoundingClientRect().top < 160;
  });
  const end = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 4;
  const now = end ? "about" : seen[seen.length - 1] || "overview";
  for (const link of document.querySelectorAll("#nav a"))
    link.getAttribute("href") === `#${now}`
      ? link.setAttribute("aria-current", "true")
      : link.removeAttribute("aria-current");
}
addEventListener("scroll", () => requestAnimationFrame(mark), { passive: true });

const themes = ["system", "light", "dark"];
const kept = {
  get: () => {
    try {
      return localStorage.getItem("rlar-theme");
    } catch {
      return null;
    }
  },
  set: (value) => {
    try {
      localStorage.setItem("rlar-theme", value);
    } catch {
      /* a page without storage */
    }
  },
};
function theme(name) {
  if (name === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", name);
  document.getElementById("theme").textContent = `Theme: ${name}`;
}
let themeNow = themes.includes(kept.get()) ? kept.get() : "system";
theme(themeNow);
document.getElementById("theme").addEventListener("click", () => {
  themeNow = themes[(themes.indexOf(themeNow) + 1) % 3];
  kept.set(themeNow);
  theme(themeNow);
});

const every = Number(document.documentElement.dataset.live || 0);
const stateLine = document.getElementById("state");
let etag = null;
async function refresh() {
  try {
    const answer = await fetch("data.json", { headers: etag ? { "If-None-Match": etag } : {}, cache: "no-store" });
    if (answer.status === 200) {
      const first = etag === null,
        before = figures.made;
      etag = answer.headers.get("ETag");
      const fresh = await answer.json();
      if (!first || fresh.made !== before) {
        const read = figures.samples.find((group) => keyOf(group) === state.group);
        if (read && !fresh.samples.some((group) => keyOf(group) === state.group)) fresh.samples.push(read);
        figures = fresh;
        const inside =
          document.activeElement &&
          document.activeElement.closest("#samples") &&
          document.activeElement.matches("input, select");
        const shown = SECTIONS.map(([id]) => id).filter((id) => id !== "samples" || !inside); // not under the hand of who types
        const open = [...document.querySelectorAll("details[open]")].length;
        if (!open) again(...shown);
        else again("alarms");
        navigation();
      }
    } else if (answer.status !== 304) throw new Error(String(answer.status));
    stateLine.className = "live";
    stateLine.textContent = `live · ${fmt.n(figures.run.rows)} responses`;
  } catch {
    stateLine.className = "live lost";
    stateLine.textContent = "the server is gone; the figures stay";
  }
  setTimeout(refresh, every * 1000);
}

again();
navigation();
document.documentElement.setAttribute("data-ready", "");
if (every) refresh();
if (location.hash) {
  const el = document.getElementById(location.hash.slice(1));
  if (el) el.scrollIntoView();
}
