// The page of the playground: arrows to drag, what the methods make of them, and the address that brings them back.
//
// A classic script, loaded after methods.js; see there for why. Nothing is fetched, and nothing is kept but the address.
"use strict";

(() => {
  const { METHODS, solve, cone, norm } = gradsurgeryMethods;

  // Half the width of the frame, in the units of the gradients, and the longest arrow in it. Longer ones are shortened.
  const FRAME = 2.9;
  const LONGEST = 2.45;
  const EQUAL = 2.0;
  const STEP = 0.05;
  const BIG_STEP = 0.5;
  const LARGEST = 1e6;
  const THIRD = [-0.3, 1.6];
  const SVG = "http://www.w3.org/2000/svg";

  const PRESETS = [
    {
      key: "conflict", name: "Conflict", rows: [[2, 0.35], [-0.85, 0.5]],
      story: "The gradients oppose each other. The plain sum leaves the green cone, and loss 2 rises. The others let both "
        + "losses fall; for two gradients PCGrad and UPGrad are the same.",
    },
    {
      key: "agreement", name: "Agreement", rows: [[1.2, 0.2], [0.3, 0.9]],
      story: "No conflict. PCGrad and UPGrad leave the plain sum alone; the others still shift weight towards the shorter "
        + "gradient.",
    },
    {
      key: "lengths", name: "Very different lengths", rows: [[2.2, 0.8], [-0.28, 0.18]],
      story: "One loss is seven times as loud. PCGrad and UPGrad stay long, and close to where loss 2 is unchanged; CAGrad "
        + "goes past that. MGDA stays short, twice the shortest vector between the gradients. Nash-MTL points halfway "
        + "between them, whatever their lengths.",
    },
    {
      key: "opposite", name: "Opposite", rows: [[1.8, 0.6], [-0.9, -0.3]],
      story: "What helps one loss hurts the other. Along the green line neither changes, so the methods that let no loss "
        + "rise stand still. The plain sum and CAGrad go on with the longer gradient.",
    },
    {
      key: "fan", name: "Three in a fan", rows: [[1.1, 0.2], [0.75, 0.75], [-1.3, 0.45]],
      story: "Loss 3 opposes the two others, and rises with the plain sum. PCGrad and UPGrad part: PCGrad projects on one "
        + "gradient after the other, UPGrad on the whole cone. The small crosses are what PCGrad's random orders give.",
    },
    {
      key: "outvoted", name: "Outvoted", rows: [[1.4, 0.5], [1.3, -0.1], [-1.1, 0.6]],
      story: "Two losses against one. The plain sum follows the two. CAGrad stays near the mean: here too near, and loss 3 "
        + "rises under it as well.",
    },
    {
      key: "around", name: "All round", rows: [[1.6, 0.2], [-0.9, 1.3], [-0.5, -1.4]],
      story: "There is no green cone: every direction raises some loss (the point is Pareto stationary). MGDA, Nash-MTL and "
        + "UPGrad stand still. The others go on, and some losses rise.",
    },
    {
      key: "zero", name: "One zero", rows: [[1.7, 0.5], [-0.8, 0.9], [0, 0]],
      story: "Loss 3 has no gradient. MGDA takes that for the end and stands still. Nash-MTL leaves the loss out of the "
        + "bargain. The plain sum, PCGrad and UPGrad are as without it.",
    },
  ];

  const WORDS = {
    sum: "adds the gradients up",
    pcgrad: "removes from each gradient what opposes another; mean over its random orders",
    mgda: "shortest vector between the gradients, times their number",
    cagrad: "best for the worst-off loss, within a ball around the mean",
    nash: "bargains: the length of one gradient does not turn it",
    upgrad: "projects each gradient on the green cone, and adds up",
    config: "one cosine with every gradient, whatever their lengths",
    conic: "best for the worst-off loss, within a cone around the mean",
    fairgrad: "shares the improvement fairly; at alpha = 0 the plain sum, projected on the green cone (DualProj)",
    gcs: "gradient 1, and the others as far as they agree with it",
    blur: "gradient 1 forgets; of the others it adds what is at a right angle to it",
    sago: "x and y by themselves: gradient 1 forgets, but where the others have the opposite sign they count instead",
  };

  const SUBSCRIPT = ["₁", "₂", "₃"];

  // ---------------------------------------------------------------------------------------- state

  const root = document.getElementById("pg-root");
  const state = { rows: copied(PRESETS[0].rows), equal: false, hidden: new Set(), more: new Set(), options: initial() };
  let lit = null;
  let moving = null;

  /** The library's defaults, by method. */
  function initial() {
    return Object.fromEntries(METHODS.filter(({ option }) => option).map(({ key: own, option }) => [own, option.initial]));
  }

  const isShown = (method) => !method.more || state.more.has(method.key);

  function answer(method, rows) {
    const given = method.option ? { [method.option.name]: state.options[method.key] } : {};
    return { key: method.key, name: method.name, ...solve(method.key, rows, given) };
  }

  /** A value of an option from its text; undefined if it is none. */
  function optionOf({ least, most, values, initial: first }, text) {
    if (values) return values.find((value) => value === text);
    if (least === undefined) return { true: true, false: false }[text] ?? (text === null ? undefined : first);
    const value = text === null || text.trim() === "" ? NaN : Number(text);
    return value >= least && value <= most ? value : undefined;
  }

  function copied(rows) {
    return rows.map((row) => [...row]);
  }

  function toHash() {
    const parts = [`g=${state.rows.map((row) => row.join(",")).join(";")}`];
    if (state.equal) parts.push("arrows=equal");
    if (state.more.size) parts.push(`more=${[...state.more].join(",")}`);
    if (state.hidden.size) parts.push(`hide=${[...state.hidden].join(",")}`);
    METHODS.filter(({ option }) => option).forEach(({ key: own, option }) => {
      if (state.options[own] !== option.initial) parts.push(`${own}.${option.name}=${state.options[own]}`);
    });
    return `#${parts.join("&")}`;
  }

  /** Take the situation from the address; false if it holds none that can be shown. */
  function fromHash(hash) {
    const parts = new URLSearchParams(hash.replace(/^#/, ""));
    const rows = (parts.get("g") ?? "").split(";").map((row) => row.split(",").map((x) => (x.trim() ? Number(x) : NaN)));
    const sound = (rows.length === 2 || rows.length === 3)
      && rows.every((row) => row.length === 2 && row.every((x) => Math.abs(x) <= LARGEST));
    if (!sound) return false;
    state.rows = rows;
    state.equal = parts.get("arrows") === "equal";
    const named = (name) => {
      const found = (parts.get(name) ?? "").split(",");
      return METHODS.filter((method) => found.includes(method.key));
    };
    state.hidden = new Set(named("hide").map((method) => method.key));
    state.more = new Set(named("more").filter((method) => method.more).map((method) => method.key));
    state.options = initial();
    METHODS.filter(({ option }) => option).forEach(({ key: own, option }) => {
      state.options[own] = optionOf(option, parts.get(`${own}.${option.name}`)) ?? option.initial;
    });
    return true;
  }

  let keeping = 0;
  /** Write the address once things are quiet: browsers refuse too many changes in a row. */
  function keep() {
    clearTimeout(keeping);
    keeping = setTimeout(() => history.replaceState(null, "", toHash()), 200);
  }

  // ---------------------------------------------------------------------------------------- small helpers

  function element(name, attributes = {}, ...children) {
    return filled(document.createElement(name), attributes, children);
  }

  function drawn(name, attributes = {}, ...children) {
    return filled(document.createElementNS(SVG, name), attributes, children);
  }

  function filled(node, attributes, children) {
    Object.entries(attributes).forEach(([name, value]) => {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null) node.setAttribute(name, value);
    });
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  /** A number for reading: two decimals where they say something, a proper minus, never −0. */
  function shown(x) {
    const size = Math.abs(x);
    let text = size.toFixed(2);
    if (size >= 1e4 || (size > 1e-9 && size < 0.005)) text = size.toExponential(1).replace("e+", "e").replace("e-", "e−");
    else if (size >= 100) text = size.toFixed(0);
    return (x < 0 && Number(size.toFixed(2)) + (size > 1e-9) > 0 ? "−" : "") + text;
  }

  const rounded = (x) => Number(x.toFixed(2)) + 0;
  const names = (list) => (list.length < 2 ? list.join("") : `${list.slice(0, -1).join(", ")} and ${list.at(-1)}`);
  const losses = (list) => `loss${list.length > 1 ? "es" : ""} ${names(list.map((i) => i + 1))}`;

  // ---------------------------------------------------------------------------------------- the frame of the page

  const plane = drawn("svg", { class: "pg-plane", role: "group", "aria-label": "Gradients and directions in the plane" });
  const layers = {};
  ["ground", "cone", "methods", "gradients", "labels", "handles"].forEach((name) => {
    layers[name] = drawn("g", { class: `pg-layer-${name}` });
    if (name !== "handles") layers[name].setAttribute("aria-hidden", "true");
    plane.append(layers[name]);
  });
  const handles = [0, 1, 2].map((i) => {
    const handle = drawn(
      "g",
      {
        class: "pg-handle", tabindex: "0", role: "slider", "data-row": i,
        "aria-label": `Gradient of loss ${i + 1}`, "aria-roledescription": "arrow to drag",
        "aria-valuemin": "-180", "aria-valuemax": "180", "aria-describedby": "pg-keys",
      },
      drawn("circle", { class: "pg-reach", r: 22 }),
      drawn("circle", { class: "pg-ring", r: 15 }),
      drawn("circle", { class: "pg-knob", r: 10 }),
      drawn("text", { class: "pg-number", dy: "0.35em" }, String(i + 1)),
    );
    handle.addEventListener("pointerdown", (event) => grab(event, i));
    // `touch-action: none` does not reach every part of a drawing in every browser.
    handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    handle.addEventListener("keydown", (event) => nudge(event, i));
    layers.handles.append(handle);
    return handle;
  });

  const presets = element("div", { class: "pg-presets", role: "group", "aria-label": "Situations" });
  PRESETS.forEach((preset) => {
    const button = element("button", { type: "button", "data-preset": preset.key, onclick: () => choose(preset) }, preset.name);
    presets.append(button);
  });
  const story = element("p", { class: "pg-story" });

  const fields = [0, 1, 2].map((i) => {
    const field = (axis) => element("input", {
      type: "number", step: STEP, inputmode: "decimal", "data-row": i, "data-axis": axis,
      "aria-label": `Gradient of loss ${i + 1}, ${"xy"[axis]}`,
      oninput: (event) => typed(event, i, axis), onblur: () => render(),
    });
    const length = element("span", { class: "pg-length" });
    const inputs = [field(0), field(1)];
    return { inputs, length, line: element("tr", {}, element("th", { scope: "row" }, `g${SUBSCRIPT[i]}`),
      ...inputs.map((input) => element("td", {}, input)), element("td", {}, length)) };
  });
  const third = element("button", { type: "button", class: "pg-third", onclick: toggleThird });
  const equal = [["true", "true length"], ["equal", "one length"]].map(([value, text]) => {
    const input = element("input", {
      type: "radio", name: "pg-arrows", value,
      onchange: () => { state.equal = value === "equal"; changed(); },
    });
    return { input, label: element("label", {}, input, ` ${text}`) };
  });
  const copy = element("button", { type: "button", onclick: copyLink }, "Copy link");
  const copiedNote = element("span", { class: "pg-note", role: "status" });
  const code = element("code", { class: "pg-rows" });

  const side = element(
    "div", { class: "pg-side" },
    element("table", { class: "pg-fields" },
      element("thead", {}, element("tr", {}, ...["gradient", "x", "y", "length"].map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...fields.map((field) => field.line))),
    third,
    element("fieldset", { class: "pg-arrows" }, element("legend", {}, "Draw the methods at"), ...equal.map((each) => each.label)),
    element("ul", { class: "pg-legend" },
      element("li", {}, key("gradient"), "gradient of a loss: drag its head"),
      element("li", {}, key("cone"), "common descent: no loss rises"),
      element("li", {}, key("method"), "direction of a method"),
      element("li", {}, key("cross"), "PCGrad in single orders")),
    element("p", { class: "pg-hint", id: "pg-keys" }, "Keys: Tab to an arrow head, arrow keys move it, Shift for big steps."),
    element("div", { class: "pg-share" }, copy, copiedNote),
  );

  function key(kind) {
    const picture = drawn("svg", { width: 30, height: 16, viewBox: "0 0 30 16", "aria-hidden": "true", class: "pg-key" });
    if (kind === "gradient") {
      picture.append(drawn("line", { class: "pg-gradient", x1: 0, y1: 8, x2: 18, y2: 8 }), drawn("circle", { class: "pg-knob", cx: 22, cy: 8, r: 7 }));
    } else if (kind === "cone") {
      picture.append(drawn("rect", { class: "pg-cone", x: 1, y: 1, width: 28, height: 14, rx: 2 }));
    } else if (kind === "method") {
      picture.append(drawn("line", { class: "pg-line pg-is-pcgrad", x1: 0, y1: 8, x2: 22, y2: 8 }), marker("pcgrad", 24, 8));
    } else {
      picture.append(...[8, 15, 22].map((x) => cross(x, 8)));
    }
    return picture;
  }

  const cards = METHODS.map((method) => {
    const box = element("input", {
      type: "checkbox", "aria-label": `Draw ${method.name}`,
      onchange: (event) => {
        if (event.target.checked) state.hidden.delete(method.key);
        else state.hidden.add(method.key);
        changed();
      },
    });
    const icon = drawn("svg", { width: 18, height: 18, viewBox: "0 0 18 18", "aria-hidden": "true" }, marker(method.key, 9, 9));
    const length = element("span", { class: "pg-length" });
    const option = method.option ? optionControl(method) : null;
    const lines = [0, 1, 2].map((i) => {
      const fill = element("span", { class: "pg-fill" });
      const weight = element("span", { class: "pg-weight" });
      const effect = element("td", { class: "pg-effect" });
      const line = element("tr", {}, element("th", { scope: "row" }, `loss ${i + 1}`),
        element("td", {}, element("span", { class: "pg-bar" }, fill), weight), effect);
      return { line, fill, weight, effect };
    });
    const verdict = element("p", { class: "pg-verdict" });
    const card = element(
      "section", { class: `pg-card pg-is-${method.key}`, "data-method": method.key, "aria-label": method.name },
      element("h2", {}, element("label", {}, box, icon, element("span", {}, method.name)), length),
      element("p", { class: "pg-words" }, WORDS[method.key]),
      option && option.label,
      element("table", {},
        element("thead", {}, element("tr", {}, element("th", { scope: "col" }, element("span", { class: "pg-unseen" }, "loss")),
          element("th", { scope: "col" }, "weight"), element("th", { scope: "col" }, "change"))),
        element("tbody", {}, ...lines.map((each) => each.line))),
      verdict,
    );
    const light = (on) => () => { lit = on ? method.key : null; plane.dataset.lit = lit ?? ""; dim(); };
    card.addEventListener("pointerenter", light(true));
    card.addEventListener("pointerleave", light(false));
    card.addEventListener("focusin", light(true));
    card.addEventListener("focusout", light(false));
    return { card, box, length, option, lines, verdict, method };
  });

  /** What sets the argument of a method: a slider, a list or a box. */
  function optionControl(method) {
    const { name, least, most, step, values } = method.option;
    const set = (value) => { state.options[method.key] = value; changed(); };
    const about = { "aria-label": `${method.name}: ${name}`, class: "pg-set" };
    const shownValue = element("output", {});
    let input;
    if (values) {
      input = element("select", { ...about, onchange: (event) => set(event.target.value) }, ...values.map((value) => element("option", { value }, value)));
    } else if (least === undefined) {
      input = element("input", { ...about, type: "checkbox", onchange: (event) => set(event.target.checked) });
    } else {
      input = element("input", { ...about, type: "range", min: least, max: most, step, oninput: (event) => set(event.target.valueAsNumber) });
    }
    // The site's own keys lead to other pages.
    input.addEventListener("keydown", (event) => { if (event.key.startsWith("Arrow")) event.stopPropagation(); });
    const label = element("label", { class: "pg-option" }, element("code", {}, name), least === undefined ? null : shownValue, input);
    const refresh = () => {
      const value = state.options[method.key];
      if (input.type === "checkbox") input.checked = value;
      else input.value = String(value);
      shownValue.textContent = `= ${value}`;
    };
    return { label, refresh };
  }

  const more = element("div", { class: "pg-presets pg-more", role: "group", "aria-label": "More methods" }, element("span", {}, "More methods:"));
  METHODS.filter((method) => method.more).forEach((method) => {
    more.append(element("button", {
      type: "button", "data-more": method.key,
      onclick: () => {
        if (!state.more.delete(method.key)) state.more.add(method.key);
        changed();
      },
    }, method.name));
  });

  // On a phone the cards are far below the arrows. The same in short stands right below them; screen readers have the cards.
  const summary = element("table", { class: "pg-summary", "aria-hidden": "true" });

  function summarise(results) {
    const top = element("tr", {}, element("th", {}, "change"), ...state.rows.map((_, i) => element("th", {}, `loss ${i + 1}`)));
    summary.replaceChildren(top, ...results.filter((result) => !state.hidden.has(result.key)).map((result) => {
      const icon = drawn("svg", { width: 16, height: 16, viewBox: "0 0 18 18" }, marker(result.key, 9, 9));
      return element("tr", { class: `pg-is-${result.key}`, "data-method": result.key }, element("th", {}, icon, ` ${result.name}`),
        ...result.effects.map((effect, i) => element("td", { class: `pg-effect ${EFFECTS[effect + 1].kind}` },
          `${EFFECTS[effect + 1].sign} ${change(effect, result.slopes[i])}`)));
    }));
  }

  const EFFECTS = [{ sign: "▼", word: "falls", kind: "pg-falls" }, { sign: "●", word: "unchanged", kind: "pg-same" }, { sign: "▲", word: "rises", kind: "pg-rises" }];
  const change = (effect, slope) => (effect === 0 ? "0" : `${effect > 0 ? "+" : ""}${shown(-slope)}`);

  const live = element("p", { class: "pg-unseen", role: "status", "aria-live": "polite", id: "pg-live" });

  root.replaceChildren(
    presets,
    // The words change with the arrows, so they stand below the plane: it must not move while something is dragged.
    element("div", { class: "pg-main" }, element("div", { class: "pg-figure" }, plane), summary, story, side, more,
      element("div", { class: "pg-cards" }, ...cards.map((each) => each.card))),
    element("p", { class: "pg-code" }, "In Python: ", code),
    live,
  );
  root.classList.add("pg-ready");

  // ---------------------------------------------------------------------------------------- changes

  function changed() {
    render();
    keep();
  }

  function stop() {
    cancelAnimationFrame(moving);
    moving = null;
  }

  function setRow(i, row) {
    stop();
    state.rows[i] = row.map((x) => Math.max(-LARGEST, Math.min(LARGEST, x)));
    changed();
  }

  /** Go to a preset, in a quarter of a second where the reader likes motion. */
  function choose(preset) {
    stop();
    const target = copied(preset.rows);
    const start = target.map((row, i) => state.rows[i] ?? [0, 0]);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    let since = null;
    const frame = (now) => {
      since ??= now;
      const share = Math.min(1, (now - since) / 250);
      const eased = share * share * (3 - 2 * share);
      state.rows = share === 1 ? target : target.map((row, i) => row.map((x, k) => start[i][k] + (x - start[i][k]) * eased));
      if (share === 1) {
        moving = null;
        changed();
      } else {
        moving = requestAnimationFrame(frame);
        render();
      }
    };
    if (still) {
      state.rows = target;
      changed();
    } else {
      moving = requestAnimationFrame(frame);
    }
  }

  function toggleThird() {
    stop();
    if (state.rows.length === 3) state.rows.pop();
    else state.rows.push([...THIRD]);
    changed();
  }

  function typed(event, i, axis) {
    const value = event.target.valueAsNumber;
    if (!Number.isFinite(value)) return;
    const row = [...state.rows[i]];
    row[axis] = value;
    setRow(i, row);
  }

  function nudge(event, i) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const move = moves[event.key];
    if (move === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation(); // the site's own keys go to the page before and the page after
    const size = event.shiftKey ? BIG_STEP : STEP;
    setRow(i, state.rows[i].map((x, k) => (Math.abs(x) < 1e3 ? rounded(x + size * move[k]) : x + size * move[k])));
  }

  function grab(event, i) {
    if (event.button !== 0) return;
    event.preventDefault();
    const handle = handles[i];
    handle.focus({ preventScroll: true });
    handle.setPointerCapture(event.pointerId);
    handle.classList.add("pg-held");
    // The head stays under the finger where it was taken.
    const [x, y] = place(tip(state.rows[i]));
    const box = plane.getBoundingClientRect();
    const [dx, dy] = [event.clientX - box.left - x, event.clientY - box.top - y];
    const move = (moved) => {
      const now = plane.getBoundingClientRect();
      const point = [
        (moved.clientX - now.left - dx - now.width / 2) / unit(),
        (now.height / 2 - (moved.clientY - now.top - dy)) / unit(),
      ];
      const length = norm(point);
      setRow(i, point.map((v) => rounded(length > LONGEST ? (v * LONGEST) / length : v)));
    };
    const release = () => {
      handle.classList.remove("pg-held");
      handle.removeEventListener("pointermove", move);
      handle.removeEventListener("pointerup", release);
      handle.removeEventListener("pointercancel", release);
    };
    handle.addEventListener("pointermove", move);
    handle.addEventListener("pointerup", release);
    handle.addEventListener("pointercancel", release);
  }

  async function copyLink() {
    clearTimeout(keeping);
    history.replaceState(null, "", toHash());
    try {
      await navigator.clipboard.writeText(location.href);
      copiedNote.textContent = "Copied.";
    } catch {
      copiedNote.textContent = "Copy the address of this page.";
    }
    setTimeout(() => { copiedNote.textContent = ""; }, 4000);
  }

  // ---------------------------------------------------------------------------------------- drawing

  const width = () => plane.clientWidth || 420;
  const unit = () => width() / 2 / FRAME;
  const place = (point) => [width() / 2 + point[0] * unit(), width() / 2 - point[1] * unit()];

  /** Where an arrow ends in the drawing: long ones are shortened. */
  function tip(row) {
    const length = norm(row);
    return length > LONGEST ? row.map((x) => (x * LONGEST) / length) : row;
  }

  function marker(name, x, y) {
    const shapes = {
      sum: drawn("circle", { r: 5 }),
      pcgrad: drawn("rect", { x: -5, y: -5, width: 10, height: 10 }),
      mgda: drawn("path", { d: "M0-6.5 6 4.5H-6Z" }),
      cagrad: drawn("path", { d: "M0-7 7 0 0 7-7 0Z" }),
      nash: drawn("path", { d: "M0-7 1.9-2.4 6.7-2.2 3 .9 4.2 5.7 0 3-4.2 5.7-3 .9-6.7-2.2-1.9-2.4Z" }),
      upgrad: drawn("circle", { r: 5.5 }),
      config: drawn("path", { d: "M-3.2-5.6H3.2L6.4 0 3.2 5.6H-3.2L-6.4 0Z" }),
      conic: drawn("path", { d: "M0 6.5 6-4.5H-6Z" }),
      fairgrad: drawn("path", { d: "M-2.2-6.2H2.2V-2.2H6.2V2.2H2.2V6.2H-2.2V2.2H-6.2V-2.2H-2.2Z" }),
      gcs: drawn("path", { d: "M-6.5 3.2A6.5 6.5 0 0 1 6.5 3.2Z" }),
      blur: drawn("rect", { x: -6.5, y: -3.2, width: 13, height: 6.4, rx: 3.2 }),
      sago: drawn("path", { d: "M-6-2.9-2.9-6 0-3.1 2.9-6 6-2.9 3.1 0 6 2.9 2.9 6 0 3.1-2.9 6-6 2.9-3.1 0Z" }),
    };
    shapes[name].setAttribute("class", `pg-marker pg-is-${name}`);
    shapes[name].setAttribute("transform", `translate(${x} ${y})`);
    return shapes[name];
  }

  function cross(x, y) {
    return drawn("path", { class: "pg-cross pg-is-pcgrad", d: "M-3-3 3 3M-3 3 3-3", transform: `translate(${x} ${y})` });
  }

  function ground() {
    const size = width();
    const lines = [];
    for (let k = -2; k <= 2; k++) {
      const [x, y] = place([k, k]);
      const kind = k === 0 ? "pg-axis" : "pg-grid";
      lines.push(drawn("line", { class: kind, x1: x, y1: 0, x2: x, y2: size }), drawn("line", { class: kind, x1: 0, y1: y, x2: size, y2: y }));
      if (k !== 0) {
        lines.push(drawn("text", { class: "pg-tick", x: x + 3, y: size / 2 + 12 }, String(k).replace("-", "−")));
        lines.push(drawn("text", { class: "pg-tick", x: size / 2 + 4, y: y - 3 }, String(k).replace("-", "−")));
      }
    }
    return lines;
  }

  function coneShapes(found) {
    const far = FRAME - 0.15;
    const at = (angle, radius = far) => place([radius * Math.cos(angle), radius * Math.sin(angle)]);
    const [ox, oy] = place([0, 0]);
    const stroke = (from, to) => drawn("line", { class: "pg-cone-line", x1: from[0], y1: from[1], x2: to[0], y2: to[1] });
    if (found.kind === "plane") return [drawn("circle", { class: "pg-cone", cx: ox, cy: oy, r: far * unit() })];
    if (found.kind === "line") return [stroke(at(found.from), at(found.from + Math.PI))];
    if (found.kind === "ray") return [stroke([ox, oy], at(found.from))];
    if (found.kind === "point") return [];
    const [a, b] = [at(found.from), at(found.to)];
    const r = far * unit();
    return [drawn("path", { class: "pg-cone", d: `M${ox} ${oy}L${a[0]} ${a[1]}A${r} ${r} 0 0 0 ${b[0]} ${b[1]}Z` })];
  }

  function coneWords(found, m) {
    const every = m === 2 ? "both" : "all";
    return {
      plane: "no loss changes",
      wedge: `${every} losses fall`,
      line: "no loss changes",
      ray: "no loss rises",
      point: "",
    }[found.kind];
  }

  function coneSentence(found, m) {
    const every = m === 2 ? "both" : "all";
    if (found.kind === "wedge") {
      const degrees = ((found.to - found.from) * 180) / Math.PI;
      const angle = degrees >= 9.95 ? degrees.toFixed(0) : Number(degrees.toPrecision(2));
      return `In the green cone, ${angle}° wide, ${every} losses fall${state.rows.some((row) => norm(row) === 0) ? " (those with a gradient)" : ""}.`;
    }
    return {
      plane: "All gradients are zero.",
      line: "No direction lowers both losses; along the green line neither changes.",
      ray: "No direction lowers all losses; along the green line none rises.",
      point: "Every direction raises some loss.",
    }[found.kind].replace("both losses; along the green line neither", m === 2 ? "both losses; along the green line neither" : "all losses; along the green line none");
  }

  function head(from, to, kind) {
    const length = Math.hypot(to[0] - from[0], to[1] - from[1]);
    if (length < 12) return null;
    const [x, y] = [(to[0] - from[0]) / length, (to[1] - from[1]) / length];
    const back = [to[0] - 11 * x, to[1] - 11 * y];
    const points = [to, [back[0] - 4.5 * y, back[1] + 4.5 * x], [back[0] + 4.5 * y, back[1] - 4.5 * x]];
    return drawn("polygon", { class: kind, points: points.map((point) => point.join(",")).join(" ") });
  }

  /** Methods whose arrows end in one place, so that they can share a line and a label. */
  function grouped(results) {
    const groups = [];
    results.filter((result) => !state.hidden.has(result.key)).forEach((result) => {
      const length = norm(result.direction);
      const still = length <= 1e-12 * result.terms || length === 0;
      const wanted = still ? [0, 0] : state.equal ? result.direction.map((x) => (x * EQUAL) / length) : result.direction;
      const end = still ? [0, 0] : tip(wanted);
      const times = !still && !state.equal && length > LONGEST ? length / LONGEST : 1;
      const twin = groups.find((group) => norm([group.end[0] - end[0], group.end[1] - end[1]]) * unit() < 2 && Math.abs(group.times / times - 1) < 0.01);
      if (twin) twin.members.push(result);
      else groups.push({ end, times, still, members: [result] });
    });
    return groups;
  }

  function methodShapes(groups) {
    const origin = place([0, 0]);
    const lines = [];
    const marks = [];
    groups.forEach((group) => {
      const to = place(group.end);
      const count = group.members.length;
      const length = Math.hypot(to[0] - origin[0], to[1] - origin[1]) || 1;
      // Markers of one place stand side by side, across the arrow; those at the origin in a row below it.
      const across = group.still ? [1, 0] : [-(to[1] - origin[1]) / length, (to[0] - origin[0]) / length];
      group.boxes = group.members.map((member, k) => {
        const shift = (k - (count - 1) / 2) * 14;
        const at = [to[0] + across[0] * shift, to[1] + across[1] * shift + (group.still ? 16 : 0)];
        if (!group.still) {
          const dash = member.key === "sum" && count === 1 ? "5 4" : count > 1 ? `9 ${9 * (count - 1)}` : null;
          lines.push(drawn("line", {
            class: `pg-line pg-is-${member.key}`, "data-of": member.key, x1: origin[0], y1: origin[1], x2: to[0], y2: to[1],
            "stroke-dasharray": dash, "stroke-dashoffset": count > 1 ? -9 * k : null,
          }));
        }
        const mark = marker(member.key, at[0], at[1]);
        mark.dataset.of = member.key;
        marks.push(mark);
        return { x: at[0] - 8, y: at[1] - 8, width: 16, height: 16 };
      });
    });
    return [lines, marks];
  }

  function outcomes() {
    if (state.hidden.has("pcgrad") || state.equal || state.rows.length < 3) return [];
    const ends = gradsurgeryMethods.pcgradOutcomes(state.rows).map((weights) => (
      [0, 1].map((k) => weights.reduce((total, w, i) => total + w * state.rows[i][k], 0))));
    const apart = ends.some((end) => norm([end[0] - ends[0][0], end[1] - ends[0][1]]) * unit() > 6);
    return apart ? ends.filter((end) => norm(end) <= LONGEST) : [];
  }

  // ---------------------------------------------------------------------------------------- labels

  const pen = document.createElement("canvas").getContext("2d");

  function textWidth(text, bold) {
    pen.font = `${bold ? "600 " : ""}13px ${getComputedStyle(root).fontFamily}`;
    return pen.measureText(text).width;
  }

  /** A label in lines that leave room on either side of them in the frame, broken between names. */
  function folded(text) {
    const lines = [];
    text.match(/[^=,:]+[=,:]?/g).forEach((part) => {
      const longer = lines.length ? `${lines[lines.length - 1]} ${part.trim()}` : part.trim();
      if (lines.length && textWidth(longer, true) <= 0.6 * width()) lines[lines.length - 1] = longer;
      else lines.push(part.trim());
    });
    return lines;
  }

  const overlap = (a, b) => (
    Math.max(0, Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x))
    * Math.max(0, Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y)));

  /** How much of a stretch from one point to another lies in a box, in pixels. */
  function crossed(line, box) {
    const steps = 60;
    let inside = 0;
    for (let k = 0; k <= steps; k++) {
      const x = line[0][0] + ((line[1][0] - line[0][0]) * k) / steps;
      const y = line[0][1] + ((line[1][1] - line[0][1]) * k) / steps;
      if (x > box.x - 1 && x < box.x + box.width + 1 && y > box.y && y < box.y + box.height) inside += 1;
    }
    return (inside * Math.hypot(line[1][0] - line[0][0], line[1][1] - line[0][1])) / steps;
  }

  /** The best of some places for a label, among what is taken already. */
  function settle(size, candidates, taken, lines) {
    const full = width();
    let best = null;
    candidates.forEach(({ x, y, cost }) => {
      const box = { x: x - size.width / 2, y: y - size.height / 2, ...size };
      const padded = { x: box.x - 2, y: box.y - 1, width: box.width + 4, height: box.height + 2 };
      const outside = Math.max(0, 3 - box.x) + Math.max(0, box.x + box.width - full + 3) + Math.max(0, 3 - box.y) + Math.max(0, box.y + box.height - full + 3);
      const total = cost + 60 * outside + taken.reduce((sum, other) => sum + 3 * overlap(padded, other), 0)
        + lines.reduce((sum, line) => sum + 1.2 * crossed(line, box), 0);
      if (best === null || total < best.total) best = { total, box };
    });
    return best;
  }

  function labels(groups, found, crosses) {
    const origin = place([0, 0]);
    const shapes = [];
    const taken = state.rows.map((row) => {
      const [x, y] = place(tip(row));
      return { x: x - 15, y: y - 15, width: 30, height: 30 };
    });
    groups.forEach((group) => taken.push(...group.boxes));
    crosses.forEach(([x, y]) => taken.push({ x: x - 4, y: y - 4, width: 8, height: 8 }));
    const lines = [...state.rows.map((row) => [origin, place(tip(row))]), ...groups.map((group) => [origin, place(group.end)])];
    const round = (anchor, outward, size, near) => {
      const candidates = [];
      for (let k = 0; k < 24; k++) {
        const angle = outward + (k % 2 ? 1 : -1) * Math.ceil(k / 2) * (Math.PI / 12);
        for (const distance of [near, near + 8, near + 18, near + 32, near + 50]) {
          const [c, s] = [Math.cos(angle), Math.sin(angle)];
          candidates.push({
            x: anchor[0] + c * (distance + size.width / 2),
            y: anchor[1] - s * (distance + size.height / 2),
            cost: 0.9 * (distance - near) + 0.25 * k,
          });
        }
      }
      return candidates;
    };
    const add = (text, kind, anchor, outward, near, leader, of) => {
      const parts = folded(text);
      const size = { width: Math.max(...parts.map((part) => textWidth(part, true))), height: 16 * parts.length };
      const { box } = settle(size, round(anchor, outward, size, near), taken, lines);
      taken.push(box);
      const middle = [box.x + box.width / 2, box.y + box.height / 2];
      const edge = [Math.max(box.x, Math.min(anchor[0], box.x + box.width)), Math.max(box.y, Math.min(anchor[1], box.y + box.height))];
      if (leader && Math.hypot(edge[0] - anchor[0], edge[1] - anchor[1]) > near + 14) {
        shapes.push(drawn("line", { class: "pg-leader", x1: anchor[0], y1: anchor[1], x2: edge[0], y2: edge[1], "data-of": of }));
      }
      shapes.push(drawn("text", { class: `pg-label ${kind}`, "data-of": of }, ...parts.map((part, k) => (
        drawn("tspan", { x: middle[0], y: box.y + 16 * k + 8, dy: "0.35em" }, part)))));
    };
    state.rows.forEach((row, i) => {
      const length = norm(row);
      const times = length > LONGEST * 1.001 ? ` ×${shown(length / LONGEST)}` : "";
      const anchor = place(tip(row));
      add(`g${SUBSCRIPT[i]}${length === 0 ? " = 0" : times}`, "pg-of-gradient", anchor, Math.atan2(row[1], row[0]), 15, false, "");
    });
    [...groups].sort((a, b) => norm(b.end) - norm(a.end)).forEach((group) => {
      const text = group.members.map((member) => member.name).join(group.still ? ", " : " = ")
        + (group.times > 1.001 ? ` ×${shown(group.times)}` : "")
        + (group.still ? `: stand${group.members.length > 1 ? "" : "s"} still` : "");
      const anchor = place(group.end);
      const outward = group.still ? -Math.PI / 2 : Math.atan2(group.end[1], group.end[0]);
      const kind = group.members.length === 1 ? `pg-is-${group.members[0].key}` : "pg-of-several";
      add(text, kind, group.still ? [anchor[0], anchor[1] + 16] : anchor, outward, 9, !group.still, group.members.map((member) => member.key).join(" "));
    });
    const words = coneWords(found, state.rows.length);
    if (words && found.kind !== "plane") {
      const size = { width: textWidth(words, true), height: 16 };
      const candidates = [];
      const [from, to] = [found.from, found.to ?? found.from];
      const sides = found.kind === "line" ? [0, Math.PI] : [0];
      for (const half of sides) {
        for (const share of [0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 0.1, 0.9, -0.1, 1.1, -0.3, 1.3]) {
          for (const radius of [FRAME - 0.3, FRAME - 0.55, FRAME - 0.8, FRAME - 1.1, FRAME - 1.4, 1.2]) {
            const angle = from + half + (to - from) * share;
            const [x, y] = place([radius * Math.cos(angle), radius * Math.sin(angle)]);
            const narrow = Math.max(0, size.width - (to - from) * radius * unit());
            candidates.push({ x, y, cost: 8 * (FRAME - radius) + 10 * Math.abs(share - 0.5) + 0.05 * narrow });
          }
        }
      }
      const { box } = settle(size, candidates, taken, lines);
      // Where there is no room the sentence above has to do.
      if (taken.every((other) => overlap(box, other) < 8)) {
        shapes.push(drawn("text", { class: "pg-label pg-of-cone", x: box.x + box.width / 2, y: box.y + box.height / 2, dy: "0.35em" }, words));
      }
    }
    return shapes;
  }

  // ---------------------------------------------------------------------------------------- all of it

  function dim() {
    plane.querySelectorAll("[data-of]").forEach((node) => {
      const own = node.dataset.of.split(" ");
      node.classList.toggle("pg-dim", lit !== null && !state.hidden.has(lit) && node.dataset.of !== "" && !own.includes(lit));
    });
  }

  function verdictOf(result) {
    const of = (effect) => result.effects.map((_, i) => i).filter((i) => result.effects[i] === effect);
    const [falls, rises] = [of(-1), of(1)];
    const m = result.effects.length;
    const every = m === 2 ? "both losses" : "all losses";
    if (rises.length) return { text: `${losses(rises)} ${rises.length > 1 ? "rise" : "rises"}`, kind: "rises" };
    if (falls.length === m) return { text: `${every} fall`, kind: "falls" };
    if (falls.length) return { text: `${losses(falls)} ${falls.length > 1 ? "fall" : "falls"}, none rises`, kind: "falls" };
    return { text: "stands still", kind: "same" };
  }

  let saying = 0;

  function render() {
    const { rows } = state;
    const m = rows.length;
    const size = width();
    plane.setAttribute("viewBox", `0 0 ${size} ${size}`);
    const results = METHODS.filter(isShown).map((method) => answer(method, rows));
    const found = cone(rows);
    const origin = place([0, 0]);

    layers.ground.replaceChildren(...ground());
    layers.cone.replaceChildren(...coneShapes(found));
    const groups = grouped(results);
    const crosses = outcomes().map(place);
    const crossShapes = crosses.map(([x, y]) => {
      const mark = cross(x, y);
      mark.dataset.of = "pcgrad";
      return mark;
    });
    const [lines, marks] = methodShapes(groups);
    layers.methods.replaceChildren(...lines, ...crossShapes, ...marks);
    layers.gradients.replaceChildren(...rows.flatMap((row) => {
      const to = place(tip(row));
      const length = Math.hypot(to[0] - origin[0], to[1] - origin[1]);
      if (length < 1) return [];
      const short = [origin[0] + ((to[0] - origin[0]) * Math.max(0, length - 9)) / length, origin[1] + ((to[1] - origin[1]) * Math.max(0, length - 9)) / length];
      return [drawn("line", { class: "pg-gradient", x1: origin[0], y1: origin[1], x2: short[0], y2: short[1] }), head(origin, short, "pg-gradient-head")].filter(Boolean);
    }), drawn("circle", { class: "pg-origin", cx: origin[0], cy: origin[1], r: 3 }));
    layers.labels.replaceChildren(...labels(groups, found, crosses));
    handles.forEach((handle, i) => {
      const here = i < m;
      handle.style.display = here ? "" : "none";
      if (!here) return;
      const [x, y] = place(tip(rows[i]));
      handle.setAttribute("transform", `translate(${x} ${y})`);
      const degrees = Math.round((Math.atan2(rows[i][1], rows[i][0]) * 180) / Math.PI);
      handle.setAttribute("aria-valuenow", String(degrees));
      handle.setAttribute("aria-valuetext", `x ${shown(rows[i][0])}, y ${shown(rows[i][1])}, length ${shown(norm(rows[i]))}, direction ${degrees} degrees`);
    });
    dim();

    fields.forEach((field, i) => {
      field.line.hidden = i >= m;
      if (i >= m) return;
      field.inputs.forEach((input, axis) => {
        // Not while it is being typed in: "1." would lose its point.
        if (document.activeElement !== input) input.value = String(rounded(rows[i][axis]) === 0 ? rows[i][axis] : Number(rows[i][axis].toPrecision(6)));
      });
      field.length.textContent = shown(norm(rows[i]));
    });
    third.textContent = m === 3 ? "Remove the third gradient" : "Add a third gradient";
    equal[0].input.checked = !state.equal;
    equal[1].input.checked = state.equal;

    const top = Math.max(...results.flatMap((result) => (result.weights ?? []).map(Math.abs)), 1e-300);
    more.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(state.more.has(button.dataset.more))));
    summarise(results);
    cards.forEach((card) => {
      const result = results.find((each) => each.key === card.method.key);
      card.card.hidden = result === undefined;
      if (result === undefined) return;
      card.option?.refresh();
      card.box.checked = !state.hidden.has(result.key);
      card.card.classList.toggle("pg-hidden", state.hidden.has(result.key));
      card.length.textContent = `length ${shown(norm(result.direction))}`;
      card.lines.forEach((line, i) => {
        line.line.hidden = i >= m;
        if (i >= m) return;
        line.fill.style.width = `${(100 * Math.abs(result.weights?.[i] ?? 0)) / top}%`;
        line.weight.textContent = result.weights ? shown(result.weights[i]) : "none";
        const effect = result.effects[i];
        const { sign, word, kind } = EFFECTS[effect + 1];
        line.effect.className = `pg-effect ${kind}`;
        line.effect.replaceChildren(element("span", { "aria-hidden": "true" }, `${sign} `),
          element("span", { class: "pg-unseen" }, `${word} `), change(effect, result.slopes[i]));
      });
      const verdict = verdictOf(result);
      card.verdict.textContent = verdict.text;
      card.verdict.className = `pg-verdict pg-${verdict.kind}`;
    });

    const preset = PRESETS.find((each) => JSON.stringify(each.rows) === JSON.stringify(rows));
    presets.querySelectorAll("button").forEach((button) => {
      button.setAttribute("aria-pressed", String(preset !== undefined && button.dataset.preset === preset.key));
    });
    story.textContent = `${coneSentence(found, m)} ${preset ? preset.story : ""}`;
    code.textContent = `rows = torch.tensor(${JSON.stringify(rows).replaceAll(",", ", ")}, dtype=torch.float64)`;

    clearTimeout(saying);
    saying = setTimeout(() => {
      live.textContent = `${rows.map((row, i) => `Gradient ${i + 1}: x ${shown(row[0])}, y ${shown(row[1])}.`).join(" ")} ${coneSentence(found, m)} ${
        results.map((result) => `${result.name}: ${verdictOf(result).text}${result.weights ? `, weights ${result.weights.map(shown).join(", ")}` : ""}.`).join(" ")}`;
    }, 500);
  }

  window.addEventListener("hashchange", () => {
    if (location.hash !== toHash() && fromHash(location.hash)) {
      stop();
      render();
    }
  });
  new ResizeObserver(() => render()).observe(plane);
  fromHash(location.hash);
  render();

  // For tests.
  globalThis.gradsurgeryPlayground = { state, PRESETS };
})();
