"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const array = (text, Type) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Type(bytes.buffer);
  };
  const count = data.pieces.length;
  const classes = array(data.classes, Uint16Array);
  const counts = array(data.counts, Uint32Array);
  const ids = array(data.ids, Uint32Array);
  const tags = data.tags === null ? null : array(data.tags, Uint16Array);
  const models = data.models.map((m) => ({
    ...m,
    selected: array(m.selected, Uint16Array),
    gates: array(m.gates, Uint16Array),
    losses: array(m.losses, Float32Array),
  }));
  const state = { mode: "0", layer: -1, view: "both", filter: "", shown: 0, pinned: -1 };
  const get = (id) => document.getElementById(id);
  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Values that are coloured.
  const selections = (model, layer, token, kind) => {
    const start = (layer * count + token) * model.topk;
    let found = 0;
    for (let k = 0; k < model.topk; k++) found += model.kindOf[model.selected[start + k]] === kind;
    return found;
  };
  const value = (model, token) => {
    if (state.mode === "loss") return model.losses[token];
    const kind = Number(state.mode);
    if (state.layer >= 0) {
      return state.layer < model.layers.length ? selections(model, state.layer, token, kind) : NaN;
    }
    let sum = 0;
    for (let l = 0; l < model.layers.length; l++) sum += selections(model, l, token, kind);
    return sum / model.layers.length;
  };

  // Colours: from white to the kind's; differences from vermilion (less) over white to blue (more).
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mix = (colour, share) => {
    const part = Math.max(0, Math.min(1, share));
    return colour.map((c) => Math.round(255 + (c - 255) * part));
  };
  const css = (c) => `rgb(${c[0]}, ${c[1]}, ${c[2]})`;
  const ink = (c) => (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 140 ? "#ffffff" : "#1f2933");
  const LESS = rgb("#d55e00");
  const MORE = rgb("#0072b2");
  const base = () => {
    if (state.mode === "loss") return rgb("#b5179e");
    const kind = Number(state.mode);
    return rgb(data.kinds[kind] === "zero" ? "#52606d" : data.colours[kind]);
  };
  const top = () => {
    if (state.mode === "loss") return Math.max(...models.map((m) => m.highLoss));
    return Math.max(...models.map((m) => m.topk));
  };
  const isDifference = () => state.view === "difference" && models.length > 1;
  const reach = () => (state.mode === "loss" ? top() / 2 : top());
  const colour = (number) => {
    if (Number.isNaN(number)) return [255, 255, 255];
    if (isDifference()) return mix(number < 0 ? LESS : MORE, Math.abs(number) / reach());
    return mix(base(), number / top());
  };

  // The text.
  const panels = [];
  const border = (number) => {
    const made = element("s");
    made.title = `window ${number} begins: the model remembers nothing of the text before`;
    return made;
  };
  const build = () => {
    panels.length = 0;
    const texts = get("texts");
    texts.replaceChildren();
    const shown = isDifference() ? [null] : models;
    shown.forEach((model, index) => {
      const column = element("div");
      if (models.length > 1) {
        const title = model === null ? "B minus A" : `${"AB"[index]}: ${model.label}`;
        column.append(element("h3", "", title));
      }
      const panel = element("div", document.body.dataset.code ? "text panel code" : "text panel");
      panel.tabIndex = 0;
      panel.setAttribute("role", "group");
      panel.setAttribute("aria-label", "Text; arrow keys go from token to token");
      const tokens = [];
      data.pieces.forEach((piece, at) => {
        if (at > 0 && at % data.window === 0) panel.append(border(at / data.window + 1));
        if (data.gaps[at]) panel.append(data.gaps[at]);
        const token = element("b");
        // The sign stands where the line ends; drawn by the style sheet, it is not copied along.
        piece.split("\n").forEach((line, index) => {
          if (index > 0) token.append(element("i", "nl"), "\n");
          token.append(line);
        });
        if (piece === "") token.classList.add("part");
        token.dataset.i = at;
        tokens.push(token);
        panel.append(token);
      });
      column.append(panel);
      texts.append(column);
      panels.push({ model, panel, tokens });
    });
    panels.forEach(({ panel }) => {
      panel.addEventListener("scroll", () => {
        panels.forEach((other) => {
          if (Math.abs(other.panel.scrollTop - panel.scrollTop) > 1) {
            other.panel.scrollTop = panel.scrollTop;
          }
        });
      });
    });
  };
  const isShown = (at) => {
    if (state.filter === "") return true;
    const [what, number] = state.filter.split(":");
    return (what === "class" ? classes : tags)[at] === Number(number);
  };
  const paint = () => {
    panels.forEach(({ model, tokens }) => {
      tokens.forEach((token, at) => {
        const number =
          model === null ? value(models[1], at) - value(models[0], at) : value(model, at);
        const c = colour(number);
        token.style.backgroundColor = css(c);
        token.style.color = ink(c);
        token.classList.toggle("faded", !isShown(at));
        token.classList.toggle("pinned", at === state.pinned);
      });
    });
    legend();
  };
  const legend = () => {
    const stops = [0, 0.25, 0.5, 0.75, 1];
    const unit = state.mode === "loss" ? " nats" : "";
    const end = isDifference() ? reach() : top();
    const text = state.mode === "loss" ? end.toFixed(1) : String(end);
    const start = isDifference() ? -end : 0;
    get("low").textContent = isDifference() ? `-${text}` : "0";
    get("high").textContent = (isDifference() ? "+" : "") + text + unit;
    const colours = stops.map((s) => css(colour(start + (end - start) * s)));
    get("ramp").style.backgroundImage = `linear-gradient(90deg, ${colours.join(", ")})`;
  };

  // The path of one token.
  const visible = (piece) =>
    piece === ""
      ? "(part of a character)"
      : piece.replace(/ /g, "\u00b7").replace(/\n/g, "\\n").replace(/\t/g, "\\t").replace(/\r/g, "\\r");
  const gate = (model, slot) => (model.gates[slot] / 65535) * model.largestGate;
  const ways = (model, layer, token) => {
    const found = [];
    for (let k = 0; k < model.topk; k++) {
      const slot = (layer * count + token) * model.topk + k;
      const expert = model.selected[slot];
      found.push({
        expert,
        name: model.names[expert],
        kind: model.kindOf[expert],
        gate: gate(model, slot),
      });
    }
    return found;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    Object.entries(attributes).forEach(([key, v]) => made.setAttribute(key, v));
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const drawing = (model, token) => {
    const experts = model.names.length;
    const rows = model.layers.length;
    const height = Math.max(15, Math.min(30, 330 / rows));
    const [left, head, width] = [26, 20, 336];
    const x = (expert) => left + ((expert + 0.5) * (width - left)) / experts;
    const y = (layer) => head + (layer + 0.5) * height;
    const svg = shape("svg", {
      viewBox: `0 0 ${width} ${head + rows * height}`,
      role: "img",
      "aria-label": `Experts of ${rows} layers that the token takes`,
    });
    data.kinds.forEach((kind, index) => {
      const own = model.kindOf.map((k, e) => (k === index ? e : -1)).filter((e) => e >= 0);
      if (own.length === 0) return;
      const half = (width - left) / experts / 2;
      const [from, to] = [x(own[0]) - half, x(own[own.length - 1]) + half];
      svg.append(
        shape("rect", {
          x: from + 1, y: head - 3, width: to - from - 2, height: rows * height + 3, rx: 4,
          fill: data.colours[index], opacity: 0.1,
        }),
      );
      const label = own.length > 1 || experts < 10 ? kind : kind.slice(0, 5);
      svg.append(
        shape("text", {
          x: (from + to) / 2, y: 11, "text-anchor": "middle", "font-size": 9.5, fill: "var(--muted)",
        }, to - from < 5 * label.length ? label.slice(0, 1) : label),
      );
    });
    const paths = model.layers.map((_, layer) => ways(model, layer, token));
    paths.slice(1).forEach((next, layer) => {
      paths[layer].forEach((a) => next.forEach((b) => {
        svg.append(
          shape("line", {
            x1: x(a.expert), y1: y(layer), x2: x(b.expert), y2: y(layer + 1),
            stroke: "var(--muted)", "stroke-width": 0.6 + 1.6 * Math.sqrt((a.gate * b.gate) / model.largestGate ** 2),
            opacity: 0.45,
          }),
        );
      }));
    });
    const dot = Math.min(height / 2 - 1.5, Math.max(2.2, (width - left) / experts / 2 - 1), 9);
    model.layers.forEach((number, layer) => {
      svg.append(
        shape("text", { x: left - 8, y: y(layer) + 3.4, "text-anchor": "end", "font-size": 9.5, fill: "var(--muted)" }, number),
      );
      for (let e = 0; e < experts; e++) {
        svg.append(shape("circle", { cx: x(e), cy: y(layer), r: Math.min(1.4, dot), fill: "var(--field-line)" }));
      }
      paths[layer].forEach((way) => {
        const mark = shape("circle", {
          cx: x(way.expert), cy: y(layer), fill: data.colours[way.kind], stroke: "var(--panel)", "stroke-width": 1,
          r: dot * (0.5 + 0.5 * Math.sqrt(way.gate / model.largestGate)),
        });
        mark.append(shape("title", {}, `layer ${number}: ${way.name}, gate ${way.gate.toFixed(3)}`));
        svg.append(mark);
      });
    });
    return svg;
  };
  const list = (model, token) => {
    const made = element("ol");
    model.layers.forEach((number, layer) => {
      const row = element("li");
      row.dataset.layer = number;
      row.append(element("span", "", `layer ${number}`));
      ways(model, layer, token).forEach((way) => {
        const chip = element("span", "way");
        const mark = element("i");
        mark.style.background = data.colours[way.kind];
        chip.append(mark, element("span", "expert", way.name), element("em", "", way.gate.toFixed(3)));
        row.append(chip);
      });
      made.append(row);
    });
    return made;
  };
  const lossOf = (model, at) => {
    const loss = model.losses[at];
    if (Number.isNaN(loss)) return "none";
    const p = Math.exp(-loss);
    const text = p < 0.001 ? p.toExponential(1) : p.toPrecision(2);
    return models.length > 1 ? loss.toFixed(2) : `${loss.toFixed(2)} (p ${text})`;
  };
  const ffnOf = (model, at) => {
    let sum = 0;
    model.layers.forEach((_, layer) => { sum += selections(model, layer, at, 0); });
    return (sum / model.layers.length).toFixed(2);
  };
  const show = (at) => {
    state.shown = at;
    const facts = [
      ["kind of token", data.classNames[classes[at]]],
      ...(tags === null ? [] : [["part of speech", data.tagNames[tags[at]]]]),
      ["FFN experts per layer", models.map((m) => ffnOf(m, at)).join(" / ")],
      ["loss", models.map((m) => lossOf(m, at)).join(" / ")],
      ["occurs", counts[at] === 1 ? "once" : `${counts[at]} times`],
      ["place", `${at % data.window} of window ${Math.floor(at / data.window) + 1}`],
      ["token id", ids[at]],
    ];
    const table = element("dl");
    facts.forEach(([name, text]) => table.append(element("dt", "", name), element("dd", "", text)));
    const parts = [element("span", "token", visible(data.pieces[at])), table];
    models.forEach((model, index) => {
      if (models.length > 1) parts.push(element("h4", "", `${"AB"[index]}: ${model.label}`));
      parts.push(drawing(model, at));
      if (models.length === 1 || model.layers.length <= 8) parts.push(list(model, at));
    });
    const hint = state.pinned < 0 ? "Click a token to keep it here." : "Kept; click it again to let go.";
    parts.push(element("p", "hint", `${hint} Dots: experts by layer, sized by gate.`));
    get("path").dataset.token = at;
    get("path").replaceChildren(...parts);
    panels.forEach(({ tokens, panel }) => {
      panel.querySelectorAll("b.on").forEach((token) => token.classList.remove("on"));
      tokens[at].classList.add("on");
    });
  };
  const pin = (at) => {
    state.pinned = at;
    panels.forEach(({ tokens, panel }) => {
      panel.querySelectorAll("b.pinned").forEach((token) => token.classList.remove("pinned"));
      if (at >= 0) tokens[at].classList.add("pinned");
    });
    show(at >= 0 ? at : state.shown);
  };
  const tokenOf = (event) => {
    const token = event.target.closest("b[data-i]");
    return token === null ? -1 : Number(token.dataset.i);
  };

  // Controls.
  const layerButtons = () => {
    const names = models[0].layers.length >= (models[1] || models[0]).layers.length
      ? models[0].layers : models[1].layers;
    ["mean", ...names].forEach((name, index) => {
      const button = element("button", "", name);
      button.type = "button";
      button.setAttribute("aria-pressed", index === 0);
      button.addEventListener("click", () => {
        state.layer = index - 1;
        get("layers").querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", b === button));
        paint();
      });
      get("layers").append(button);
    });
  };
  const option = (text, key) => {
    const made = element("option", "", text);
    made.value = key;
    return made;
  };
  const filters = () => {
    const add = (names, numbers, what) => {
      names.forEach((name, number) => {
        const found = numbers.reduce((sum, n) => sum + (n === number), 0);
        if (found > 0) get("filter").append(option(`${name} (${found.toLocaleString("en")})`, `${what}:${number}`));
      });
    };
    get("filter").append(option("all tokens", ""));
    add(data.classNames, classes, "class");
    if (tags !== null) add(data.tagNames, tags, "tag");
  };
  const pick = (key) => {
    state.filter = key;
    get("filter").value = key;
    paint();
    get("tools").scrollIntoView({ behavior: "smooth" });
  };
  const listen = () => {
    get("mode").addEventListener("change", (event) => {
      state.mode = event.target.value;
      // A loss has no layer.
      get("layers").querySelectorAll("button").forEach((b) => { b.disabled = state.mode === "loss"; });
      paint();
    });
    get("filter").addEventListener("change", (event) => {
      state.filter = event.target.value;
      paint();
    });
    if (get("view") !== null) {
      get("view").addEventListener("change", (event) => {
        state.view = event.target.value;
        build();
        paint();
        show(state.shown);
      });
    }
    get("texts").addEventListener("mouseover", (event) => {
      const at = tokenOf(event);
      if (at >= 0 && state.pinned < 0) show(at);
    });
    get("texts").addEventListener("click", (event) => {
      const at = tokenOf(event);
      if (at >= 0) pin(at === state.pinned ? -1 : at);
    });
    get("texts").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") pin(-1);
      if (step === undefined) return;
      event.preventDefault();
      const next = Math.max(0, Math.min(count - 1, state.shown + step));
      pin(next);
      panels[0].tokens[next].scrollIntoView({ block: "nearest" });
    });
    document.querySelectorAll(".pick").forEach((button) => {
      button.addEventListener("click", () => {
        const isClass = button.dataset.class !== undefined;
        const names = isClass ? data.classNames : data.tagNames;
        const number = names.indexOf(isClass ? button.dataset.class : button.dataset.tag);
        pick(`${isClass ? "class" : "tag"}:${number}`);
      });
    });
  };
  layerButtons();
  filters();
  build();
  paint();
  listen();
  show(0);
})();
