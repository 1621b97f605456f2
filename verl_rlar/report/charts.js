// SPDX-License-Identifier: Apache-2.0
// The page's building blocks: elements, foreign text, and charts as inline SVG. Whatever comes from a run ends in a text
// node or in the value of an attribute of a fixed name; no markup is ever made of a string.

const SVG = "http://www.w3.org/2000/svg";
const OUTCOMES = ["scored", "hacked", "abstained", "failed"];
const DASHES = ["", "7 4", "2 4"];

function fill(el, props, kids) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else el.setAttribute(name, value === true ? "" : String(value));
  }
  for (const kid of kids.flat(Infinity)) {
    if (kid === undefined || kid === null || kid === false) continue;
    el.append(kid instanceof Node ? kid : document.createTextNode(String(kid)));
  }
  return el;
}
const h = (tag, props, ...kids) => fill(document.createElement(tag), props, kids);
const s = (tag, props, ...kids) => fill(document.createElementNS(SVG, tag), props, kids);

// Characters that a reader would not see, or that turn the text around, are shown by their number.
const HIDDEN =
  /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\udb40[\udc00-\udfff]/g;
const codeOf = (char) => "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
const plain = (text) => String(text).replace(HIDDEN, (char) => `\u27e8${codeOf(char)}\u27e9`);
function foreign(text) {
  const found = [];
  let at = 0;
  text = String(text);
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > at) found.push(text.slice(at, match.index));
    found.push(h("span", { class: "odd-char" }, codeOf(match[0])));
    at = match.index + match[0].length;
  }
  found.push(text.slice(at));
  return found;
}
const bdi = (text) => h("bdi", {}, foreign(text));

const whole = new Intl.NumberFormat("en");
const fmt = {
  n: (value) => (value === null || value === undefined ? "–" : whole.format(Math.round(value))),
  v: (value) =>
    value === null || value === undefined
      ? "–"
      : Math.abs(value) >= 1000
        ? whole.format(Math.round(value))
        : value.toFixed(3),
  g: (value) => (value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(4)))),
  p: (value) =>
    value === null || value === undefined ? "–" : (100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0) + " %",
  d: (value) => (value ? `$${value >= 100 ? whole.format(Math.round(value)) : value.toFixed(value < 1 ? 4 : 2)}` : "–"),
  s: (value) => {
    if (value === null || value === undefined) return "–";
    if (value < 0.001) return (value * 1e6).toFixed(0) + " µs";
    if (value < 1) return (value * 1000).toFixed(value < 0.01 ? 1 : 0) + " ms";
    if (value < 120) return value.toFixed(1) + " s";
    return value < 7200 ? (value / 60).toFixed(1) + " min" : (value / 3600).toFixed(1) + " h";
  },
};
const sum = (values) => values.reduce((a, b) => a + (b || 0), 0);
const stepsOf = ([first, last]) => (first === last ? `step ${first}` : `steps ${first} to ${last}`);

function table(caption, columns, rows, tall) {
  // columns: [name, isNumber]; rows: arrays of cells, the first one heads the row
  return h(
    "div",
    { class: "scroll" + (tall ? " tall" : ""), tabindex: 0, role: "group", "aria-label": plain(caption) },
    h(
      "table",
      {},
      h("caption", {}, foreign(caption)),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map(([name, num]) =>
            h("th", { scope: "col", class: num ? "num" : null }, name || h("span", { class: "unseen" }, "state")),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          row instanceof Node
            ? row
            : h(
                "tr",
                {},
                row.map((cell, at) =>
                  h(
                    at ? "td" : "th",
                    { scope: at ? null : "row", class: columns[at][1] ? "num" : null },
                    cell instanceof Node || Array.isArray(cell)
                      ? cell
                      : foreign(cell === null || cell === undefined ? "–" : cell),
                  ),
                ),
              ),
        ),
      ),
    ),
  );
}
function later(summary, make) {
  const body = h("div", {});
  return h(
    "details",
    {
      ontoggle: (event) => {
        if (event.target.open && !body.firstChild) body.append(make());
      },
    },
    h("summary", {}, summary),
    body,
  );
}

// --- Charts ---

const watcher = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const wide = Math.round(entry.contentRect.width);
    if (wide > 0 && wide !== entry.target.drawnAt) {
      entry.target.drawnAt = wide;
      entry.target.draw(wide);
    }
  }
});
function drawn(className, draw) {
  const el = h("div", { class: className });
  el.draw = (wide) => el.replaceChildren(...draw(wide, el));
  watcher.observe(el);
  return el;
}
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((size) => size >= rough - 1e-12);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + 1e-9 * step; tick += step)
    found.push(Number(tick.toPrecision(10)));
  return found;
}
const markOf = (at) => ({ cls: `s${at % 8}`, dash: DASHES[Math.floor(at / 8) % DASHES.length] });
function smooth(values, weights) {
  const reach = Math.floor(values.length / 50);
  if (!reach) return null;
  return values.map((value, at) => {
    if (value === null) return null;
    let total = 0,
      weight = 0;
    for (let k = Math.max(0, at - reach); k <= Math.min(values.length - 1, at + reach); k++) {
      if (values[k] === null) continue;
      const w = weights ? weights[k] || 0 : 1;
      total += w * values[k];
      weight += w;
    }
    return weight ? total / weight : value;
  });
}
const KIND_OF_EVENT = (event) =>
  event === "live"
    ? "e-live"
    : event === "shadow"
      ? "e-shadow"
      : ["quarantined", "rolled_back", "rejected"].includes(event)
        ? "e-bad"
        : "e-note";
const hidden = new Map(); // of each chart: names of series that are switched off

// Lines over steps. chart: {id, label, points, series: [{name, values, weights}], events, format, low, high, height}
function lines(chart) {
  chart.series = chart.series
    .map((line, at) => ({ mark: markOf(at), ...line }))
    .filter((line) => line.values.some((value) => value !== null));
  const off = hidden.get(chart.id) || hidden.set(chart.id, new Set()).get(chart.id);
  const box = drawn("chart", (wide, el) => drawLines(chart, off, wide, el));
  const redraw = () => {
    box.drawnAt = 0;
    const wide = Math.round(box.getBoundingClientRect().width);
    if (wide) {
      box.drawnAt = wide;
      box.draw(wide);
    }
  };
  const legend =
    chart.series.length > 1 &&
    h(
      "div",
      { class: "legend", role: "group", "aria-label": "Shown lines" },
      chart.series.map((line) => {
        const mark = line.mark;
        return h(
          "button",
          {
            type: "button",
            "data-key": `${chart.id} ${line.name}`,
            "aria-pressed": String(!off.has(line.name)),
            title: plain(line.name),
            onclick: (event) => {
              off.has(line.name) ? off.delete(line.name) : off.add(line.name);
              event.currentTarget.setAttribute("aria-pressed", String(!off.has(line.name)));
              redraw();
            },
          },
          s(
            "svg",
            { "aria-hidden": "true" },
            s("line", {
              x1: 0,
              x2: 22,
              y1: 5,
              y2: 5,
              class: `line ${mark.cls}`,
              "stroke-dasharray": mark.dash || null,
            }),
          ),
          bdi(line.name),
        );
      }),
    );
  const data = later("As a table", () =>
    table(
      chart.label,
      [["steps"], ...chart.series.map((line) => [plain(line.name), true])],
      chart.points.map((point, at) => [
        point[0] === point[1] ? point[0] : `${point[0]}–${point[1]}`,
        ...chart.series.map((line) => chart.format(line.values[at])),
      ]),
      true,
    ),
  );
  return h("figure", { "aria-label": plain(chart.label) }, box, legend, data);
}

function drawLines(chart, off, wide, el) {
  const { points, format } = chart;
  const shown = chart.series.filter((line) => !off.has(line.name));
  const values = shown.flatMap((line) => line.values.filter((value) => value !== null));
  let low = chart.low ?? Math.min(...values),
    high = chart.high ?? Math.max(...values);
  if (!values.length && (!isFinite(low) || !isFinite(high))) {
    low = 0;
    high = 1;
  }
  if (!(high > low)) {
    high = low + (Math.abs(low) || 1) * 0.1;
  }
  const tall = chart.height || 250,
    left = 48,
    right = 14,
    top = 14,
    bottom = 26;
  const first = points[0][0],
    last = points[points.length - 1][1];
  const inner = Math.max(40, wide - left - right),
    deep = tall - top - bottom;
  const x = (step) => left + (last > first ? ((step - first) / (last - first)) * inner : inner / 2);
  const middle = (at) => x((points[at][0] + points[at][1]) / 2);
  const y = (value) => top + (1 - (Math.min(high, Math.max(low, value)) - low) / (high - low)) * deep;
  const svg = s("svg", { height: tall, viewBox: `0 0 ${wide} ${tall}`, "aria-hidden": "true" });
  const axis = s("g", { class: "axis" });
  for (const tick of ticks(low, high, Math.max(2, deep / 48))) {
    axis.append(
      s("line", { x1: left, x2: wide - right, y1: y(tick), y2: y(tick) }),
      s("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, format === fmt.v ? fmt.g(tick) : format(tick)),
    );
  }
  const stepTicks = ticks(first, last, Math.max(2, inner / 90)).filter((tick) => Number.isInteger(tick));
  for (const tick of stepTicks.length ? stepTicks : [first])
    axis.append(s("text", { x: x(tick), y: tall - 8, "text-anchor": "middle" }, tick));
  svg.append(axis);
  const events = new Map();
  for (const event of chart.events || []) {
    if (event.step < first || event.step > last) continue;
    const at = points.findIndex(([, end]) => event.step <= end);
    if (!events.has(at)) events.set(at, []);
    events.get(at).push(event);
  }
  for (const [at, found] of events) {
    const kinds = found.map((event) => KIND_OF_EVENT(event.event));
    const kind = ["e-bad", "e-live", "e-shadow", "e-note"].find((name) => kinds.includes(name));
    const place = x(found[0].step);
    svg.append(
      s("line", { class: `event ${kind}`, x1: place, x2: place, y1: top, y2: top + deep }),
      s("path", { class: kind, d: `M${place} ${top - 9}l5 5-5 5-5-5z` }),
    );
  }
  const path = (of) => {
    let d = "",
      pen = "M";
    of.forEach((value, at) => {
      if (value === null || value === undefined) return;
      d += `${pen}${middle(at).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    });
    return d;
  };
  for (const line of shown) {
    const calm = smooth(line.values, line.weights),
      dash = line.mark.dash || null;
    if (calm) svg.append(s("path", { class: `line raw ${line.mark.cls}`, d: path(line.values) }));
    svg.append(s("path", { class: `line ${line.mark.cls}`, d: path(calm || line.values), "stroke-dasharray": dash }));
    const of = calm || line.values;
    of.forEach((value, at) => {
      const alone = value !== null && of.filter((other) => other !== null).length === 1;
      if (alone || (value !== null && points.length <= 24))
        svg.append(s("circle", { class: line.mark.cls, cx: middle(at), cy: y(value), r: 3 }));
    });
  }
  const cross = s("line", { class: "cross", y1: top, y2: top + deep, visibility: "hidden" });
  svg.append(cross);
  const tip = h("div", { class: "tip", hidden: true });
  const said = (at) => {
    const named = shown
      .map((line) => [line, line.values[at]])
      .filter(([, value]) => value !== null && value !== undefined)
      .sort((a, b) => b[1] - a[1]);
    return { named, happened: events.get(at) || [] };
  };
  let now = points.length - 1;
  const show = (at) => {
    now = Math.min(points.length - 1, Math.max(0, at));
    const { named, happened } = said(now);
    const place = middle(now);
    fill(cross, { x1: place, x2: place, visibility: "visible" }, []);
    tip.replaceChildren(
      h("b", {}, stepsOf(points[now])),
      ...named
        .slice(0, 12)
        .map(([line, value]) =>
          h(
            "div",
            { class: "row" },
            h(
              "span",
              {},
              s(
                "svg",
                { width: 14, height: 8, "aria-hidden": "true" },
                s("line", { x1: 0, x2: 12, y1: 4, y2: 4, class: `line ${line.mark.cls}` }),
              ),
              " ",
              bdi(line.name),
            ),
            h("span", {}, format(value)),
          ),
        ),
      ...happened.slice(0, 5).map((event) => h("div", {}, `${event.event.replace("_", " ")}: `, bdi(event.tool))),
      happened.length > 5 ? h("div", {}, `and ${happened.length - 5} more`) : "",
    );
    tip.hidden = false;
    const room = tip.getBoundingClientRect().width;
    tip.style.left = `${place + 12 + room > wide ? Math.max(0, place - room - 12) : place + 12}px`;
    tip.style.top = `${top + 4}px`;
    plot.setAttribute("aria-valuenow", now);
    plot.setAttribute(
      "aria-valuetext",
      [
        stepsOf(points[now]),
        ...named.map(([line, value]) => `${plain(line.name)} ${format(value)}`),
        ...happened.map((event) => `${plain(event.tool)} ${event.event}`),
      ].join(", "),
    );
  };
  const hide = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
  };
  const plot = h("div", {
    class: "plot",
    role: "slider",
    tabindex: 0,
    "data-key": `plot ${chart.id}`,
    "aria-label": `${plain(chart.label)}, by step`,
    "aria-valuemin": 0,
    "aria-valuemax": points.length - 1,
    "aria-valuenow": now,
    "aria-valuetext": stepsOf(points[now]),
    onpointermove: (event) => {
      const step = first + ((event.clientX - el.getBoundingClientRect().left - left) / inner) * (last - first);
      let best = 0;
      points.forEach((point, at) => {
        if (Math.abs((point[0] + point[1]) / 2 - step) < Math.abs((points[best][0] + points[best][1]) / 2 - step))
          best = at;
      });
      show(best);
    },
    onpointerleave: hide,
    onblur: hide,
    onfocus: (event) => {
      if (event.target.matches(":focus-visible")) show(now);
    },
    onkeydown: (event) => {
      const move = {
        ArrowLeft: -1,
        ArrowDown: -1,
        ArrowRight: 1,
        ArrowUp: 1,
        PageUp: 10,
        PageDown: -10,
        Home: -1e9,
        End: 1e9,
      }[event.key];
      if (event.key === "Escape") hide();
      if (move === undefined) return;
      event.preventDefault();
      show(now + move);
    },
  });
  plot.style.left = `${left}px`;
  plot.style.top = `${top}px`;
  plot.style.width = `${inner}px`;
  plot.style.height = `${deep}px`;
  return [svg, plot, tip];
}

// Bars. chart: {label, bars: [{name, value, cls}], format, height, axis: [low, high]}
function bars(chart) {
  const box = drawn("chart", (wide) => {
    const tall = chart.height || 150,
      left = 44,
      right = 6,
      top = 8,
      bottom = 24,
      deep = tall - top - bottom,
      inner = Math.max(40, wide - left - right);
    const high = Math.max(...chart.bars.map((bar) => bar.value), 1e-12);
    const each = inner / chart.bars.length;
    const svg = s("svg", { height: tall, viewBox: `0 0 ${wide} ${tall}`, "aria-hidden": "true" });
    const axis = s("g", { class: "axis" });
    for (const tick of ticks(0, high, 3).filter(Number.isInteger))
      axis.append(
        s("line", {
          x1: left,
          x2: wide - right,
          y1: top + deep * (1 - tick / high),
          y2: top + deep * (1 - tick / high),
        }),
        s(
          "text",
          { x: left - 7, y: top + deep * (1 - tick / high) + 4, "text-anchor": "end" },
          (chart.format || fmt.n)(tick),
        ),
      );
    svg.append(axis);
    chart.bars.forEach((bar, at) => {
      const size = deep * (bar.value / high);
      if (bar.value > 0)
        svg.append(
          s(
            "rect",
            {
              class: `fill ${bar.cls || "s0"}`,
              x: left + at * each + Math.min(1.5, each * 0.1),
              width: Math.max(1, each - Math.min(3, each * 0.2)),
              y: top + deep - Math.max(1.5, size),
              height: Math.max(1.5, size),
              rx: Math.min(2.5, each / 4),
            },
            s("title", {}, `${bar.name}: ${(chart.format || fmt.n)(bar.value)}`),
          ),
        );
    });
    const [low, end] = chart.axis;
    for (const [place, anchor, text] of [
      [left, "start", low],
      [left + inner / 2, "middle", (low + end) / 2],
      [left + inner, "end", end],
    ])
      axis.append(s("text", { x: place, y: tall - 7, "text-anchor": anchor }, fmt.g(text)));
    return [svg];
  });
  return h(
    "figure",
    { "aria-label": plain(chart.label) },
    box,
    later("As a table", () =>
      table(
        chart.label,
        [["range"], ["count", true]],
        chart.bars.map((bar) => [bar.name, (chart.format || fmt.n)(bar.value)]),
        true,
      ),
    ),
  );
}

// Shares of outcomes over steps, stacked. chart: {label, points, parts: {outcome: counts}, height}
function stack(chart) {
  const names = OUTCOMES.filter((name) => chart.parts[name]);
  const totals = chart.points.map((_, at) => sum(names.map((name) => chart.parts[name][at])));
  const box = drawn("chart", (wide) => {
    const tall = chart.height || 150,
      left = 48,
      right = 6,
      top = 8,
      bottom = 24,
      deep = tall - top - bottom,
      inner = Math.max(40, wide - left - right);
    const each = inner / chart.points.length;
    const svg = s("svg", { height: tall, viewBox: `0 0 ${wide} ${tall}`, "aria-hidden": "true" });
    const axis = s("g", { class: "axis" });
    for (const tick of [0, 0.5, 1])
      axis.append(
        s("line", { x1: left, x2: wide - right, y1: top + deep * (1 - tick), y2: top + deep * (1 - tick) }),
        s("text", { x: left - 7, y: top + deep * (1 - tick) + 4, "text-anchor": "end" }, fmt.p(tick)),
      );
    svg.append(axis);
    chart.points.forEach((point, at) => {
      if (!totals[at]) return;
      let under = 0;
      for (const name of names) {
        const share = (chart.parts[name][at] || 0) / totals[at];
        if (share > 0)
          svg.append(
            s(
              "rect",
              {
                class: `fill ${name}`,
                x: left + at * each,
                width: Math.max(0.8, each - (each > 6 ? 1.5 : 0)),
                y: top + deep * (1 - under - share),
                height: deep * share,
              },
              s("title", {}, `${stepsOf(point)}: ${fmt.n(chart.parts[name][at])} ${name}, ${fmt.p(share)}`),
            ),
          );
        under += share;
      }
    });
    axis.append(
      s("text", { x: left, y: tall - 7 }, chart.points[0][0]),
      s("text", { x: left + inner, y: tall - 7, "text-anchor": "end" }, chart.points[chart.points.length - 1][1]),
    );
    return [svg];
  });
  const legend = h(
    "div",
    { class: "legend" },
    names.map((name) =>
      h(
        "span",
        { class: "key" },
        s("svg", { "aria-hidden": "true" }, s("rect", { class: `fill ${name}`, width: 18, height: 10, rx: 2 })),
        name,
      ),
    ),
  );
  return h(
    "figure",
    { "aria-label": plain(chart.label) },
    box,
    legend,
    later("As a table", () =>
      table(
        chart.label,
        [["steps"], ...names.map((name) => [name, true])],
        chart.points.map((point, at) => [stepsOf(point), ...names.map((name) => fmt.n(chart.parts[name][at]))]),
        true,
      ),
    ),
  );
}

function meter(parts) {
  const total = sum(OUTCOMES.map((name) => parts[name])) || 1;
  let at = 0;
  const said = OUTCOMES.filter((name) => parts[name])
    .map((name) => `${fmt.p(parts[name] / total)} ${name}`)
    .join(", ");
  return h(
    "div",
    { class: "meter", role: "img", "aria-label": said || "no calls", title: said },
    s(
      "svg",
      { viewBox: "0 0 100 9", preserveAspectRatio: "none" },
      OUTCOMES.map((name) => {
        const wide = (100 * (parts[name] || 0)) / total;
        const made = wide > 0 && s("rect", { class: `fill ${name}`, x: at, width: wide, height: 9 });
        at += wide;
        return made;
      }),
    ),
  );
}
function spark(values) {
  const found = values.filter((value) => value !== null);
  if (found.length < 3) return null;
  const calm = smooth(values) || values;
  const low = Math.min(...found),
    high = Math.max(...found),
    wide = high - low || 1;
  let d = "",
    pen = "M";
  calm.forEach((value, at) => {
    if (value === null) {
      pen = "M";
      return;
    }
    d += `${pen}${((100 * at) / (values.length - 1)).toFixed(2)} ${(24 - (22 * (value - low)) / wide).toFixed(2)}`;
    pen = "L";
  });
  return s(
    "svg",
    { class: "spark", viewBox: "0 0 100 26", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("path", { d }),
  );
}
// A curve through points. chart: {label, points: [[x, y]], xName, yName}
function curve(chart) {
  const box = drawn("chart", (wide) => {
    const tall = 200,
      left = 44,
      right = 10,
      top = 10,
      bottom = 38,
      deep = tall - top - bottom,
      inner = Math.max(40, wide - left - right);
    const low = chart.points[0][0],
      high = chart.points[chart.points.length - 1][0];
    const x = (value) => left + ((value - low) / (high - low || 1)) * inner,
      y = (value) => top + (1 - value) * deep;
    const svg = s("svg", { height: tall, viewBox: `0 0 ${wide} ${tall}`, "aria-hidden": "true" });
    const axis = s("g", { class: "axis" });
    for (const tick of [0, 0.25, 0.5, 0.75, 1])
      axis.append(
        s("line", { x1: left, x2: wide - right, y1: y(tick), y2: y(tick) }),
        s("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, tick),
      );
    for (const tick of ticks(low, high, 4))
      axis.append(s("text", { x: x(tick), y: tall - 22, "text-anchor": "middle" }, fmt.g(tick)));
    axis.append(s("text", { x: left + inner / 2, y: tall - 4, "text-anchor": "middle" }, chart.xName));
    svg.append(
      axis,
      s("path", {
        class: "line s0",
        d: chart.points.map(([a, b], at) => `${at ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(""),
      }),
    );
    return [svg];
  });
  return h(
    "figure",
    { "aria-label": plain(chart.label) },
    box,
    later("As a table", () =>
      table(
        chart.label,
        [[chart.xName], [chart.yName, true]],
        chart.points
          .filter((_, at) => at % 4 === 0 || at === chart.points.length - 1)
          .map(([a, b]) => [fmt.g(a), fmt.v(b)]),
        true,
      ),
    ),
  );
}

// Data sources -> clusters or kinds of query -> tools; flows: [{source, group, route, n}]; what is small is put together
const NODES = 14;
function sankey(flows) {
  flows = flows.map((flow) => ({ ...flow, route: flow.route === "-" ? "(no tool)" : flow.route }));
  for (const level of ["source", "group", "route"]) {
    const sizes = new Map();
    for (const flow of flows) sizes.set(flow[level], (sizes.get(flow[level]) || 0) + flow.n);
    const kept = new Set(
      [...sizes]
        .sort((a, b) => b[1] - a[1])
        .slice(0, NODES)
        .map(([name]) => name),
    );
    if (sizes.size > NODES + 1)
      for (const flow of flows) if (!kept.has(flow[level])) flow[level] = `(${sizes.size - NODES} others)`;
  }
  const joined = new Map();
  for (const flow of flows) {
    const key = JSON.stringify([flow.source, flow.group, flow.route]),
      had = joined.get(key);
    if (!had) joined.set(key, { ...flow });
    else {
      const scored = had.scored + flow.scored;
      had.mean = scored ? ((had.mean || 0) * had.scored + (flow.mean || 0) * flow.scored) / scored : null;
      had.scored = scored;
      had.n += flow.n;
    }
  }
  flows = [...joined.values()];
  return drawn("chart", (wide) => {
    const levels = ["source", "group", "route"],
      small = wide < 560;
    const gap = 9,
      thick = 13,
      total = sum(flows.map((flow) => flow.n)) || 1;
    const columns = levels.map((level) => {
      const sizes = new Map();
      for (const flow of flows) sizes.set(flow[level], (sizes.get(flow[level]) || 0) + flow.n);
      return [...sizes].sort((a, b) => b[1] - a[1]).map(([name, n]) => ({ name, n }));
    });
    const most = Math.max(...columns.map((column) => column.length));
    const tall = Math.max(220, most * 40),
      scale = (tall - (most - 1) * gap - 12) / total;
    const room = small ? 4 : 150;
    const places = [room, wide / 2 - thick / 2, wide - thick - room];
    columns.forEach((column) => {
      const used = sum(column.map((node) => Math.max(2, node.n * scale))) + gap * (column.length - 1);
      let at = Math.max(6, (tall - used) / 2);
      for (const node of column) {
        node.y = at;
        node.tall = Math.max(2, node.n * scale);
        node.out = at;
        node.in = at;
        at += node.tall + gap;
      }
    });
    const svg = s("svg", {
      height: tall,
      viewBox: `0 0 ${wide} ${tall}`,
      role: "img",
      "aria-label": "Which data go to which tools; the table beside it says the same",
    });
    const find = (at, name) => columns[at].find((node) => node.name === name);
    const ribbons = s("g", {}),
      nodes = s("g", {});
    for (const at of [0, 1]) {
      const order = [...flows].sort(
        (a, b) =>
          find(at, a[levels[at]]).y - find(at, b[levels[at]]).y ||
          find(at + 1, a[levels[at + 1]]).y - find(at + 1, b[levels[at + 1]]).y ||
          find(0, a.source).y - find(0, b.source).y,
      );
      // Where ribbons end they lie in the order of where they come from
      for (const side of ["out", "in"]) {
        const sorted =
          side === "out"
            ? order
            : [...flows].sort(
                (a, b) =>
                  find(at, a[levels[at]]).y - find(at, b[levels[at]]).y || find(0, a.source).y - find(0, b.source).y,
              );
        for (const flow of sorted) {
          const node = side === "out" ? find(at, flow[levels[at]]) : find(at + 1, flow[levels[at + 1]]);
          flow[`${side}${at}`] = node[side];
          node[side] += Math.max(0.8, flow.n * scale);
        }
      }
      for (const flow of order) {
        const size = Math.max(0.8, flow.n * scale),
          x0 = places[at] + thick,
          x1 = places[at + 1],
          bend = (x1 - x0) / 2,
          y0 = flow[`out${at}`],
          y1 = flow[`in${at}`];
        ribbons.append(
          s(
            "path",
            {
              class: `ribbon s${columns[0].findIndex((node) => node.name === flow.source) % 8}`,
              d: `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}v${size}C${x1 - bend} ${y1 + size} ${x0 + bend} ${y0 + size} ${x0} ${y0 + size}z`,
            },
            s(
              "title",
              {},
              `${plain(flow.source)} → ${plain(flow.group)} → ${plain(flow.route)}: ${fmt.n(flow.n)} responses, mean ${fmt.v(flow.mean)}`,
            ),
          ),
        );
      }
    }
    columns.forEach((column, at) =>
      column.forEach((node, place) => {
        nodes.append(
          s("rect", {
            class: `node ${at === 0 ? "s" + (place % 8) : "s7"}`,
            x: places[at],
            y: node.y,
            width: thick,
            height: node.tall,
            rx: 2,
          }),
        );
        const [lx, anchor] =
          at === 0 && !small
            ? [places[0] - 8, "end"]
            : at === 2 && small
              ? [places[2] - 6, "end"]
              : [places[at] + thick + 7, "start"];
        const name = plain(node.name),
          most = small ? 14 : 20;
        nodes.append(
          s(
            "text",
            {
              class: "label",
              x: lx,
              y: node.y + node.tall / 2 + (node.tall < 26 || small ? 4 : -2),
              "text-anchor": anchor,
            },
            name.length > most ? name.slice(0, most - 1) + "…" : name,
            s("title", {}, name),
          ),
        );
        if (node.tall >= 26 && !small)
          nodes.append(
            s(
              "text",
              { class: "label dim", x: lx, y: node.y + node.tall / 2 + 13, "text-anchor": anchor },
              `${fmt.n(node.n)} · ${fmt.p(node.n / total)}`,
            ),
          );
      }),
    );
    svg.append(ribbons, nodes);
    return [svg];
  });
}
