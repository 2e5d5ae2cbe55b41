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
  const selected = array(data.selected, Uint16Array);
  const gates = array(data.gates, Uint16Array);
  const losses = array(data.losses, Float32Array);
  const state = { mode: "0", layer: -1, filter: "", shown: 0, pinned: -1 };
  const get = (id) => document.getElementById(id);
  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Values that are coloured.
  const selections = (layer, token, kind) => {
    const start = (layer * count + token) * data.topk;
    let found = 0;
    for (let k = 0; k < data.topk; k++) found += data.kindOf[selected[start + k]] === kind;
    return found;
  };
  const meanOf = (token, kind) => {
    let sum = 0;
    for (let l = 0; l < data.layers.length; l++) sum += selections(l, token, kind);
    return sum / data.layers.length;
  };
  const value = (token) => {
    if (state.mode === "loss") return losses[token];
    const kind = Number(state.mode);
    return state.layer >= 0 ? selections(state.layer, token, kind) : meanOf(token, kind);
  };

  // Colours: from white to the kind's.
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mix = (colour, share) => {
    const part = Math.max(0, Math.min(1, share));
    return colour.map((c) => Math.round(255 + (c - 255) * part));
  };
  const css = (c) => `rgb(${c[0]}, ${c[1]}, ${c[2]})`;
  const ink = (c) => (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 140 ? "#ffffff" : "#1f2933");
  const base = () => {
    if (state.mode === "loss") return rgb("#b5179e");
    const kind = Number(state.mode);
    return rgb(data.kinds[kind] === "zero" ? "#52606d" : data.colours[kind]);
  };
  const top = () => (state.mode === "loss" ? data.highLoss : data.topk);
  const colour = (number) =>
    Number.isNaN(number) ? [255, 255, 255] : mix(base(), number / top());

  // The text.
  const panel = get("text");
  const tokens = [];
  const build = () => {
    data.pieces.forEach((piece, at) => {
      if (at > 0 && at % data.window === 0) {
        const border = element("s");
        const number = at / data.window + 1;
        border.title = `window ${number} begins: the model remembers nothing of the text before`;
        panel.append(border);
      }
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
  };
  const paint = () => {
    tokens.forEach((token, at) => {
      const c = colour(value(at));
      token.style.backgroundColor = css(c);
      token.style.color = ink(c);
      token.classList.toggle("faded", state.filter !== "" && classes[at] !== Number(state.filter));
    });
    legend();
  };
  const legend = () => {
    const isLoss = state.mode === "loss";
    get("low").textContent = "0";
    get("high").textContent = isLoss ? `${top().toFixed(1)} nats` : String(top());
    const colours = [0, 0.25, 0.5, 0.75, 1].map((share) => css(colour(top() * share)));
    get("ramp").style.backgroundImage = `linear-gradient(90deg, ${colours.join(", ")})`;
  };

  // The path of one token.
  const visible = (piece) =>
    piece === ""
      ? "(part of a character)"
      : piece.replace(/ /g, "\u00b7").replace(/\n/g, "\\n").replace(/\t/g, "\\t").replace(/\r/g, "\\r");
  const ways = (layer, token) => {
    const found = [];
    for (let k = 0; k < data.topk; k++) {
      const slot = (layer * count + token) * data.topk + k;
      const expert = selected[slot];
      const gate = (gates[slot] / 65535) * data.largestGate;
      found.push({ expert, name: data.names[expert], kind: data.kindOf[expert], gate });
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
  const drawing = (token) => {
    const experts = data.names.length;
    const rows = data.layers.length;
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
      const own = data.kindOf.map((k, e) => (k === index ? e : -1)).filter((e) => e >= 0);
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
    const paths = data.layers.map((_, layer) => ways(layer, token));
    paths.slice(1).forEach((next, layer) => {
      paths[layer].forEach((a) => next.forEach((b) => {
        svg.append(
          shape("line", {
            x1: x(a.expert), y1: y(layer), x2: x(b.expert), y2: y(layer + 1),
            stroke: "var(--muted)", "stroke-width": 0.6 + 1.6 * Math.sqrt((a.gate * b.gate) / data.largestGate ** 2),
            opacity: 0.45,
          }),
        );
      }));
    });
    const dot = Math.min(height / 2 - 1.5, Math.max(2.2, (width - left) / experts / 2 - 1), 9);
    data.layers.forEach((number, layer) => {
      svg.append(
        shape("text", { x: left - 8, y: y(layer) + 3.4, "text-anchor": "end", "font-size": 9.5, fill: "var(--muted)" }, number),
      );
      for (let e = 0; e < experts; e++) {
        svg.append(shape("circle", { cx: x(e), cy: y(layer), r: Math.min(1.4, dot), fill: "var(--field-line)" }));
      }
      paths[layer].forEach((way) => {
        const mark = shape("circle", {
          cx: x(way.expert), cy: y(layer), fill: data.colours[way.kind], stroke: "var(--panel)", "stroke-width": 1,
          r: dot * (0.5 + 0.5 * Math.sqrt(way.gate / data.largestGate)),
        });
        mark.append(shape("title", {}, `layer ${number}: ${way.name}, gate ${way.gate.toFixed(3)}`));
        svg.append(mark);
      });
    });
    return svg;
  };
  const list = (token) => {
    const made = element("ol");
    data.layers.forEach((number, layer) => {
      const row = element("li");
      row.dataset.layer = number;
      row.append(element("span", "", `layer ${number}`));
      ways(layer, token).forEach((way) => {
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
  const lossOf = (at) => {
    const loss = losses[at];
    if (Number.isNaN(loss)) return "none";
    const p = Math.exp(-loss);
    return `${loss.toFixed(2)} (p ${p < 0.001 ? p.toExponential(1) : p.toPrecision(2)})`;
  };
  const show = (at) => {
    state.shown = at;
    const facts = [
      ["kind of token", data.classNames[classes[at]]],
      ["FFN experts per layer", meanOf(at, 0).toFixed(2)],
      ["loss", lossOf(at)],
      ["occurs", counts[at] === 1 ? "once" : `${counts[at]} times`],
      ["place", `${at % data.window} of window ${Math.floor(at / data.window) + 1}`],
      ["token id", ids[at]],
    ];
    const table = element("dl");
    facts.forEach(([name, text]) => table.append(element("dt", "", name), element("dd", "", text)));
    const hint = state.pinned < 0 ? "Click a token to keep it here." : "Kept; click it again to let go.";
    get("path").dataset.token = at;
    get("path").replaceChildren(
      element("span", "token", visible(data.pieces[at])), table, drawing(at), list(at),
      element("p", "hint", `${hint} Dots: experts by layer, sized by gate.`),
    );
    panel.querySelectorAll("b.on").forEach((token) => token.classList.remove("on"));
    tokens[at].classList.add("on");
  };
  const pin = (at) => {
    state.pinned = at;
    panel.querySelectorAll("b.pinned").forEach((token) => token.classList.remove("pinned"));
    if (at >= 0) tokens[at].classList.add("pinned");
    show(at >= 0 ? at : state.shown);
  };
  const tokenOf = (event) => {
    const token = event.target.closest("b[data-i]");
    return token === null ? -1 : Number(token.dataset.i);
  };

  // Controls.
  const layerButtons = () => {
    ["mean", ...data.layers].forEach((name, index) => {
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
    get("filter").append(option("all tokens", ""));
    data.classNames.forEach((name, number) => {
      const found = classes.reduce((sum, n) => sum + (n === number), 0);
      if (found > 0) get("filter").append(option(`${name} (${found.toLocaleString("en")})`, number));
    });
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
    panel.addEventListener("mouseover", (event) => {
      const at = tokenOf(event);
      if (at >= 0 && state.pinned < 0) show(at);
    });
    panel.addEventListener("click", (event) => {
      const at = tokenOf(event);
      if (at >= 0) pin(at === state.pinned ? -1 : at);
    });
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") pin(-1);
      if (step === undefined) return;
      event.preventDefault();
      const next = Math.max(0, Math.min(count - 1, state.shown + step));
      pin(next);
      tokens[next].scrollIntoView({ block: "nearest" });
    });
    document.querySelectorAll(".pick").forEach((button) => {
      button.addEventListener("click", () => {
        pick(String(data.classNames.indexOf(button.dataset.class)));
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
