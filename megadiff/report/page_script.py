"""The report's script, which shows the values under the pointer. The page is complete without it."""

from __future__ import annotations

SCRIPT = r"""
"use strict";
const tip = document.getElementById("tip");
function axis(text) {
  const [from, to, low, high, log] = text.split(",").map(Number);
  const bend = v => log ? Math.log10(v) : v, a = bend(low), b = bend(high);
  return at => { const v = a + (b - a) * (at - from) / (to - from); return log ? 10 ** v : v; };
}
function said(v) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(v) >= size) return Number((v / size).toPrecision(4)) + letter;
  return String(Number(v.toPrecision(4)));
}
for (const plot of document.querySelectorAll("svg.plot")) {
  const x = axis(plot.dataset.x), y = axis(plot.dataset.y), cursor = plot.querySelector(".cursor");
  const [left, right] = plot.dataset.x.split(",").map(Number);
  const curves = [...plot.querySelectorAll("path.curve")].map(path => ({
    label: path.dataset.label,
    points: [...path.getAttribute("d").matchAll(/[ML]([\d.]+) ([\d.]+)/g)].map(m => [Number(m[1]), Number(m[2])]),
  }));
  const hide = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width;
    if (at < left - 4 || at > right + 4) { hide(); return; }
    let best = null;
    const lines = curves.map(curve => {
      let near = null;
      for (const p of curve.points) if (near === null || Math.abs(p[0] - at) < Math.abs(near[0] - at)) near = p;
      if (near === null) return "";
      if (best === null || Math.abs(near[0] - at) < Math.abs(best - at)) best = near[0];
      return "\n" + curve.label + ": " + said(y(near[1]));
    });
    if (best === null) return;
    tip.textContent = said(x(best)) + " " + plot.dataset.xLabel + lines.join("");
    tip.hidden = false;
    cursor.setAttribute("x1", best);
    cursor.setAttribute("x2", best);
    cursor.setAttribute("visibility", "visible");
    const width = tip.offsetWidth, height = tip.offsetHeight;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 4)) + "px";
  });
}
"""
"""Text of the script element."""
