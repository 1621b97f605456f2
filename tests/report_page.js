// SPDX-License-Identifier: Apache-2.0
// What the tests of the report ask of a page.

// Texts whose contrast to what is under them is below 4.5
const tooFaint = () => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const c = [r, g, b].map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
  };
  const under = (el) => {
    for (; el; el = el.parentElement) {
      const found = rgba(getComputedStyle(el).backgroundColor);
      if (found[3] > 250) return found;
    }
    return rgba("Canvas");
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const el = walker.currentNode.parentElement;
    if (
      !walker.currentNode.textContent.trim() ||
      !el.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    )
      continue;
    if (el.closest("svg, script, noscript, style, .unseen, option, :disabled, [aria-pressed='false']")) continue;
    const [a, b] = [light(rgba(getComputedStyle(el).color)), light(under(el))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([el.className, el.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return bad;
};

// Opens every tool, every sample, every view and every fold
const lookAtEverything = async () => {
  const rest = () => new Promise((done) => setTimeout(done, 0));
  const unfold = async () => {
    for (const el of document.querySelectorAll("details:not([open])")) el.open = true;
    await rest();
  };
  for (const key of ["curve", "split", "tools", "order"])
    for (const place of [...document.querySelectorAll(`[data-key^="${key} "]`).keys()]) {
      const button = document.querySelectorAll(`[data-key^="${key} "]`)[place];
      if (button && button.tagName === "BUTTON") {
        button.click();
        await unfold();
      }
    }
  document.querySelector('[data-key="tools all"]').click();
  for (const place of document.querySelectorAll("#tools tbody .link").keys()) {
    const link = document.querySelectorAll('#tools [data-key^="tool "]')[place];
    if (link) {
      link.click();
      await unfold();
    }
  }
  for (let more = true; more;) {
    for (const place of document.querySelectorAll("#list .item").keys()) {
      document.querySelectorAll("#list .item")[place].click();
      await unfold();
    }
    const on = document.querySelector('[data-key="page on"]');
    more = on && !on.disabled;
    if (more) on.click();
  }
  for (const plot of document.querySelectorAll(".plot")) {
    plot.focus();
    plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
  }
  await rest();
};

// Attributes that would run something
const handlers = () =>
  [...document.querySelectorAll("*")]
    .flatMap((el) => el.getAttributeNames())
    .filter((name) => /^on|^srcdoc$/.test(name));

// Tries to run a script, to make markup of a string, and to fetch: what of it was stopped
const breakIn = async () => {
  const stopped = [];
  const script = document.createElement("script");
  try {
    script.textContent = "window.rlarRan = 1";
    document.body.append(script);
  } catch (error) {
    stopped.push("text");
  }
  try {
    document.body.innerHTML = "<img src=x onerror='window.rlarRan = 1'>";
  } catch (error) {
    stopped.push("markup");
  }
  await fetch("http://127.0.0.1:9/").catch(() => stopped.push("fetch"));
  await new Promise((done) => setTimeout(done, 50));
  return [window.rlarRan ?? null, stopped];
};

// Ids that more than one element has
const twice = () => {
  const ids = [...document.querySelectorAll("[id]")].map((el) => el.id);
  return ids.filter((id, at) => ids.indexOf(id) !== at);
};

// Controls and pictures without a name
const nameless = () =>
  [...document.querySelectorAll("button, a, select, input, [role=slider], [role=img], figure")]
    .filter((el) => !(el.getAttribute("aria-label") || el.textContent.trim() || (el.labels && el.labels.length)))
    .map((el) => el.outerHTML);
