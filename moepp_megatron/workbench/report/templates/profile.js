"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const lanesCanvas = document.getElementById("lanes");
  const overview = document.getElementById("overview");
  const tip = document.getElementById("tip");
  const range = document.getElementById("range");
  const panel = lanesCanvas.parentElement;
  // Of text on a coloured box, which is the same in light and dark.
  const BOX_INK = "#1f2933";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let INK, MUTED, LINE, PAGE, ACCENT, FRAME;
  function readColours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["--ink", "--muted", "--line", "--page", "--accent", "--field-line"];
    [INK, MUTED, LINE, PAGE, ACCENT, FRAME] = names.map((name) => style.getPropertyValue(name).trim());
  }
  readColours();
  dark.addEventListener("change", () => { readColours(); draw(); });
  const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  const GUTTER = 128, AXIS = 24, LANE = 24, GAP = 3, RANK_GAP = 12;
  const NUMBER = 0, START = 1, LENGTH = 2, LABEL = 3, DETAIL = 4, WAIT = 5;
  // The first that is seen is neither the quickest nor the one with a hiccup.
  const byLength = [...data.steps].sort((a, b) => a.duration - b.duration);
  let step = byLength[Math.floor((byLength.length - 1) / 2)];
  let from = 0, until = step.duration, alone = null, hovered = null;
  let rows = [], height = 0;

  // Light text on dark colours, dark on light ones.
  const inks = data.kinds.map(({ colour }) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return 0.299 * r + 0.587 * g + 0.114 * b > 150 ? BOX_INK : "#ffffff";
  });

  // Nested ranges of a lane go below each other.
  function layOut() {
    rows = [];
    let top = AXIS;
    step.lanes.forEach((lane, at) => {
      if (at > 0 && lane.rank !== step.lanes[at - 1].rank) top += RANK_GAP;
      const ends = [];
      const levels = lane.items.map((item) => {
        let level = ends.findIndex((end) => end <= item[START] + 0.05);
        if (level < 0) level = ends.length;
        ends[level] = item[START] + item[LENGTH];
        return level;
      });
      const depth = Math.max(1, ends.length);
      rows.push({ lane, levels, top, depth });
      top += depth * LANE + GAP;
    });
    height = top + 6;
  }

  function size(canvas, wanted) {
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    canvas.style.height = wanted + "px";
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(wanted * scale);
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, wanted);
    context.font = FONT;
    context.textBaseline = "middle";
    return [context, width];
  }

  function time(us, span) {
    if (span < 1e3) return us.toFixed(span < 20 ? 2 : 0) + " us";
    const digits = span < 2e4 ? 2 : span < 2e5 ? 1 : 0;
    return (us / 1e3).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + " ms";
  }

  function ticks(span, width) {
    const rough = (span / width) * 95;
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  }

  function draw() {
    const [context, width] = size(lanesCanvas, height);
    const scale = (width - GUTTER) / (until - from);
    const x = (us) => GUTTER + (us - from) * scale;
    const every = ticks(until - from, width - GUTTER);
    context.fillStyle = MUTED;
    context.strokeStyle = LINE;
    for (let at = Math.ceil(from / every) * every; at <= until; at += every) {
      context.beginPath();
      context.moveTo(x(at), AXIS - 6);
      context.lineTo(x(at), height);
      context.stroke();
      const text = time(at, every * 10);
      const room = context.measureText(text).width / 2;
      context.textAlign = "center";
      context.fillText(text, Math.min(x(at), width - room), 9);
    }
    context.textAlign = "left";
    for (const row of rows) drawLane(context, row, x, scale, width);
    drawNames(context, width);
    range.textContent = `${time(from, until - from)} to ${time(until, until - from)}, ` +
      `${time(until - from, until - from)} of ${time(step.duration, step.duration)}`;
    drawOverview();
  }

  function drawLane(context, { lane, levels, top, depth }, x, scale, width) {
    context.fillStyle = PAGE;
    context.fillRect(GUTTER, top, width - GUTTER, depth * LANE);
    context.save();
    context.beginPath();
    context.rect(GUTTER, top - 1, width - GUTTER, depth * LANE + 2);
    context.clip();
    lane.items.forEach((item, at) => {
      const [kind, start, length, label] = item;
      if (start + length < from || start > until) return;
      const left = Math.max(x(start), GUTTER - 2), right = Math.min(x(start + length), width + 2);
      const wide = Math.max(right - left, 0.8);
      const y = top + levels[at] * LANE + 1.5, high = LANE - 3;
      const faint = alone !== null && alone !== kind;
      context.globalAlpha = faint ? 0.13 : 1;
      context.fillStyle = data.kinds[kind].colour;
      context.fillRect(left, y, wide, high);
      if (item[WAIT] > 0) {
        const end = Math.min(x(start + Math.min(item[WAIT], length)), width + 2);
        context.fillStyle = "rgba(255,255,255,.66)";
        context.fillRect(left, y, Math.max(end - left, 0), high);
      }
      if (item === hovered) {
        context.strokeStyle = INK;
        context.lineWidth = 2;
        context.strokeRect(left, y, wide, high);
        context.lineWidth = 1;
      }
      if (wide > 34 && !faint) {
        context.fillStyle = item[WAIT] > length * 0.3 ? BOX_INK : inks[kind];
        context.fillText(fitted(context, label, wide - 8), left + 4, y + high / 2 + 0.5);
      }
      context.globalAlpha = 1;
    });
    context.restore();
  }

  function fitted(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (context.measureText(text.slice(0, middle) + "..").width <= room) low = middle;
      else high = middle - 1;
    }
    return low > 1 ? text.slice(0, low) + ".." : "";
  }

  function drawNames(context, width) {
    rows.forEach(({ lane, top, depth }, at) => {
      const first = at === 0 || rows[at - 1].lane.rank !== lane.rank;
      if (first && at > 0) {
        context.strokeStyle = FRAME;
        context.beginPath();
        context.moveTo(0, top - RANK_GAP / 2 - GAP / 2);
        context.lineTo(width, top - RANK_GAP / 2 - GAP / 2);
        context.stroke();
      }
      const previous = at > 0 ? rows[at - 1] : null;
      const again = previous && previous.lane.rank === lane.rank && previous.lane.name === lane.name;
      context.fillStyle = INK;
      if (first) {
        context.font = "600 " + FONT;
        context.fillText("rank " + lane.rank, 0, top + LANE / 2);
        context.font = FONT;
      }
      context.fillStyle = MUTED;
      context.textAlign = "right";
      if (!again) {
        const room = first ? GUTTER - 62 : GUTTER - 12;
        const name = first && lane.name.length > 9 ? fitted(context, lane.name, room) : lane.name;
        context.fillText(fitted(context, name, room), GUTTER - 9, top + LANE / 2);
      }
      context.textAlign = "left";
    });
  }

  function drawOverview() {
    const [context, width] = size(overview, 34);
    const scale = (width - GUTTER) / step.duration;
    context.fillStyle = PAGE;
    context.fillRect(GUTTER, 0, width - GUTTER, 34);
    const ranks = [...new Set(step.lanes.map((lane) => lane.rank))];
    const high = Math.max(1, 30 / ranks.length);
    for (const lane of step.lanes) {
      if (lane.name === "step" || lane.name === "waits") continue;
      const y = 2 + ranks.indexOf(lane.rank) * high;
      for (const item of lane.items) {
        context.fillStyle = data.kinds[item[NUMBER]].colour;
        context.fillRect(GUTTER + item[START] * scale, y, Math.max(item[LENGTH] * scale, 0.5), high - 1);
      }
    }
    context.globalAlpha = 0.72;
    context.fillStyle = PAGE;
    context.fillRect(GUTTER, 0, from * scale, 34);
    context.fillRect(GUTTER + until * scale, 0, width - GUTTER - until * scale, 34);
    context.globalAlpha = 1;
    context.strokeStyle = ACCENT;
    context.strokeRect(GUTTER + from * scale + 0.5, 0.5, Math.max((until - from) * scale - 1, 1), 33);
    context.fillStyle = MUTED;
    context.fillText("whole step", 0, 17);
  }

  function show(newFrom, newUntil) {
    const least = Math.min(1, step.duration);
    const span = Math.min(Math.max(newUntil - newFrom, least), step.duration);
    from = Math.min(Math.max(newFrom, 0), step.duration - span);
    until = from + span;
    draw();
  }

  function zoom(factor, share = 0.5) {
    const middle = from + (until - from) * share;
    const span = (until - from) * factor;
    show(middle - span * share, middle + span * (1 - share));
  }

  const shareAt = (event) => {
    const box = lanesCanvas.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - box.left - GUTTER) / (box.width - GUTTER)));
  };

  function itemAt(event) {
    const box = lanesCanvas.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    if (px < GUTTER) return null;
    const scale = (box.width - GUTTER) / (until - from);
    const at = from + (px - GUTTER) / scale, slack = 2 / scale;
    const row = rows.find((one) => py >= one.top && py < one.top + one.depth * LANE);
    if (!row) return null;
    const level = Math.floor((py - row.top) / LANE);
    let best = null;
    row.lane.items.forEach((item, index) => {
      if (row.levels[index] !== level) return;
      if (item[START] - slack <= at && at <= item[START] + item[LENGTH] + slack &&
          (!best || item[LENGTH] < best[LENGTH])) best = item;
    });
    return best && { item: best, lane: row.lane };
  }

  function hover(event) {
    const found = itemAt(event);
    if ((found && found.item) !== hovered) {
      hovered = found ? found.item : null;
      draw();
    }
    tip.hidden = !found;
    if (!found) return;
    const { item, lane } = found;
    tip.textContent = `${item[LABEL]}\n${item[DETAIL] && item[DETAIL] !== item[LABEL] ? item[DETAIL] + "\n" : ""}` +
      `rank ${lane.rank}, ${time(item[LENGTH], item[LENGTH])} from ${time(item[START], step.duration)}`;
    const box = panel.getBoundingClientRect();
    const left = event.clientX - box.left + 14, top = event.clientY - box.top + 16;
    tip.style.left = Math.max(4, Math.min(left, box.width - tip.offsetWidth - 8)) + "px";
    tip.style.top = (top + tip.offsetHeight > box.height ? top - tip.offsetHeight - 28 : top) + "px";
  }

  let grip = null;
  lanesCanvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const span = until - from;
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const by = ((event.deltaX || event.deltaY) / 800) * span;
      show(from + by, until + by);
    } else zoom(Math.exp(event.deltaY * 0.0016), shareAt(event));
  }, { passive: false });
  lanesCanvas.addEventListener("pointerdown", (event) => {
    grip = { x: event.clientX, from, until };
    lanesCanvas.setPointerCapture(event.pointerId);
    lanesCanvas.classList.add("dragging");
    lanesCanvas.focus({ preventScroll: true });
  });
  lanesCanvas.addEventListener("pointermove", (event) => {
    if (!grip) return hover(event);
    const by = ((grip.x - event.clientX) / (lanesCanvas.clientWidth - GUTTER)) * (grip.until - grip.from);
    tip.hidden = true;
    show(grip.from + by, grip.until + by);
  });
  const release = () => { grip = null; lanesCanvas.classList.remove("dragging"); };
  lanesCanvas.addEventListener("pointerup", release);
  lanesCanvas.addEventListener("pointercancel", release);
  lanesCanvas.addEventListener("pointerleave", () => { tip.hidden = true; hovered = null; draw(); });
  lanesCanvas.addEventListener("dblclick", () => show(0, step.duration));
  lanesCanvas.addEventListener("keydown", (event) => {
    const by = (until - from) * 0.15;
    const actions = {
      ArrowLeft: () => show(from - by, until - by), ArrowRight: () => show(from + by, until + by),
      "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7),
      ArrowUp: () => zoom(0.7), ArrowDown: () => zoom(1 / 0.7),
      0: () => show(0, step.duration), Home: () => show(0, step.duration),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    actions[event.key]();
  });

  let brush = null;
  const usAt = (event) => {
    const box = overview.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - box.left - GUTTER) / (box.width - GUTTER))) * step.duration;
  };
  overview.addEventListener("pointerdown", (event) => {
    brush = usAt(event);
    overview.setPointerCapture(event.pointerId);
  });
  overview.addEventListener("pointermove", (event) => {
    if (brush === null) return;
    const at = usAt(event);
    if (Math.abs(at - brush) > step.duration / 400) show(Math.min(at, brush), Math.max(at, brush));
  });
  overview.addEventListener("pointerup", (event) => {
    const at = usAt(event), half = (until - from) / 2;
    if (Math.abs(at - brush) <= step.duration / 400) show(at - half, at + half);
    brush = null;
  });

  panel.querySelector(".buttons").addEventListener("click", (event) => {
    const action = event.target.dataset.do;
    if (action === "in") zoom(0.6);
    if (action === "out") zoom(1 / 0.6);
    if (action === "all") show(0, step.duration);
  });

  const select = document.getElementById("step");
  data.steps.forEach((one, at) => select.append(new Option(String(one.step), String(at))));
  select.value = String(data.steps.indexOf(step));
  select.addEventListener("change", () => open(data.steps[Number(select.value)]));

  function open(chosen) {
    step = chosen;
    hovered = null;
    layOut();
    fillLegend();
    show(0, step.duration);
  }

  function fillLegend() {
    const used = new Set(step.lanes.flatMap((lane) => lane.items.map((item) => item[NUMBER])));
    const legend = document.getElementById("legend");
    legend.replaceChildren();
    data.kinds.forEach(({ name, colour }, kind) => {
      if (!used.has(kind)) return;
      const entry = document.createElement("li"), button = document.createElement("button");
      const swatch = document.createElement("i");
      swatch.style.background = colour;
      button.type = "button";
      button.setAttribute("aria-pressed", String(alone === kind));
      button.append(swatch, name.replaceAll("_", " "));
      button.addEventListener("click", () => {
        alone = alone === kind ? null : kind;
        fillLegend();
        draw();
      });
      entry.append(button);
      legend.append(entry);
    });
  }

  window.addEventListener("resize", draw);
  open(step);
})();
