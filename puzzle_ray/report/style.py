"""The page's style sheet and its one script. Nothing is loaded from elsewhere: no font, picture or address."""

STYLE = """
:root {
  color-scheme: light;
  --paper: #fbfbfa; --card: #ffffff; --ink: #16191d; --muted: #5b6470; --line: #dfe3e8; --edge: #b4bbc5;
  --attention: #a9c3f5; --ffn: #9ddcc9; --linear: #f5cf7f; --other: #d5b8ef;
  --accent: #2757c4; --good: #0d7a5f; --warm: #d9622b; --bad: #b3261e; --hot: #f5824f; --early: #a9c3f5; --late: #14316f;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --paper: #101317; --card: #181c22; --ink: #e9edf2; --muted: #9aa5b3; --line: #2c333d; --edge: #4a5462;
    --attention: #2c4f96; --ffn: #1c6b57; --linear: #84621a; --other: #63418a;
    --accent: #86aaff; --good: #4fc9a4; --warm: #ff9d6b; --bad: #ff8a80; --hot: #a8471a; --early: #2f4d8c; --late: #c3d5ff;
  }
}

* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums;
}
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: clamp(23px, 4vw, 33px); line-height: 1.2; margin: 0; overflow-wrap: anywhere; letter-spacing: -0.01em; }
h1 span { color: var(--muted); font-weight: 400; }
section { margin-top: 46px; }
section > h2 { font-size: 21px; margin: 0 0 8px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 24px 0 8px; }
sup { line-height: 0; font-size: 75%; }
small { color: var(--muted); font-size: 12px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; font-weight: 600; }
.eyebrow { margin: 0 0 4px; color: var(--accent); font-weight: 600; font-size: 13px; }
.note { color: var(--muted); margin: 6px 0 14px; max-width: 84ch; font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 20px; font-size: 13.5px; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.card h2 { font-size: 13px; font-weight: 500; color: var(--muted); margin: 0; }
.card h3 { margin: 0 0 6px; }
.card small { display: block; line-height: 1.4; }
.cards p { font-size: 20px; font-weight: 650; line-height: 36px; margin: 2px 0; letter-spacing: -0.02em; white-space: nowrap; }
.cards .card:first-child p { font-size: 34px; color: var(--good); }
.columns, .samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px 28px; }
.columns > * { min-width: 0; }
.samples { grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 12px; }
.sample, .prompt { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { margin: 0; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; font-weight: 400; }
th:first-child { padding-left: 0; }
thead th { color: var(--muted); font-size: 12.5px; vertical-align: bottom; white-space: normal; }
tbody th { white-space: normal; overflow-wrap: anywhere; }
.budgets tbody th { min-width: 5em; }
.columns th, .columns td { padding: 5px 6px; }
.columns th:first-child { padding-left: 0; }
tbody th, th:first-child { text-align: left; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--paper); }
.words th { text-align: left; }
td.text { text-align: left; white-space: normal; }
td small, tbody th small { white-space: nowrap; }
td small b { display: inline-block; width: 46px; font-weight: 400; }

.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--muted); font-size: 13px; }
.chart text.strong { fill: var(--ink); font-weight: 650; }
.wide { max-width: 760px; }
.grid { stroke: var(--line); }
.axis { stroke: var(--muted); }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.line.frontier-line { stroke-width: 1.5; opacity: 0.6; }
.line.second-line { stroke: var(--warm); stroke-width: 1.5; opacity: 0.6; }
.line.depth { stroke: color-mix(in oklab, var(--late) var(--depth), var(--early)); stroke-width: 1.6; }
.line.term-kl { stroke: var(--good); }
.line.term-cosine { stroke: var(--warm); }
.line.term-lm { stroke: var(--muted); }
.line.term-heldout { stroke: var(--good); stroke-dasharray: 5 4; }
.point { fill: var(--accent); }
.second { fill: var(--warm); }
.predicted { fill: var(--card); stroke: var(--accent); stroke-width: 1.5; }
.distilled { fill: var(--warm); }
.parent-dot { fill: var(--muted); }
.chosen-dot { fill: transparent; stroke: var(--good); stroke-width: 3; }
.cross { stroke: var(--bad); stroke-width: 2; fill: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }

.legend {
  display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; margin: 8px 0;
  color: var(--muted); font-size: 12.5px;
}
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.keys { display: flex; flex-wrap: wrap; gap: 0 22px; }
.swatch { flex: none; width: 14px; height: 12px; border-radius: 3px; }
.attention { background: var(--attention); }
.ffn { background: var(--ffn); }
.linear { background: var(--linear); }
.other { background: var(--other); }
.swatch.noop { border: 1px dashed var(--muted); }
.swatch.frame { border: 2px solid var(--ink); }
.swatch.point { background: var(--accent); border-radius: 50%; width: 11px; height: 11px; }
.swatch.predicted { border: 2px solid var(--accent); border-radius: 50%; width: 11px; height: 11px; }
.swatch.distilled { background: var(--warm); width: 10px; height: 10px; transform: rotate(45deg); border-radius: 0; }
.swatch.second { background: var(--warm); border-radius: 50%; width: 11px; height: 11px; }
.swatch.origin { background: var(--muted); border-radius: 50%; width: 11px; height: 11px; }
.swatch.chosen { border: 3px solid var(--good); border-radius: 50%; height: 14px; }
.swatch.refused {
  width: 12px; background:
    linear-gradient(45deg, transparent 43%, var(--bad) 43% 57%, transparent 57%),
    linear-gradient(-45deg, transparent 43%, var(--bad) 43% 57%, transparent 57%);
}
.swatch.term-loss { background: var(--accent); }
.swatch.term-kl { background: var(--good); }
.swatch.term-cosine { background: var(--warm); }
.swatch.term-lm { background: var(--muted); }
.swatch.term-heldout { background: repeating-linear-gradient(90deg, var(--good) 0 4px, transparent 4px 7px); }
.ramp {
  width: 120px; height: 10px; border-radius: 5px; border: 1px solid var(--line);
  background: linear-gradient(90deg in oklab, var(--card), var(--hot));
}
.ramp.depth { background: linear-gradient(90deg in oklab, var(--early), var(--late)); }

.arch { table-layout: fixed; }
.arch th, .arch td { border: 0; padding: 2px 4px; text-align: center; }
.arch thead th:first-child { text-align: right; }
.arch thead th:nth-child(3), .arch thead th:nth-child(4), .arch .time { text-align: left; }
.arch th:nth-child(2) { width: 46px; }
.arch th:nth-child(4) { width: 130px; }
.arch tbody th { color: var(--muted); }
.arch .time { font-size: 12.5px; color: var(--muted); }
.box {
  position: relative; height: 27px; border: 1px solid var(--edge); border-radius: 5px;
  overflow: hidden; background: var(--card);
}
.box > i { position: absolute; inset: 0 auto 0 0; }
.left .box > i { inset: 0 0 0 auto; }
.box span { position: absolute; inset: 0; padding: 0 8px; text-align: left; line-height: 25px; }
.left .box span { text-align: right; }
.box em { font-style: normal; opacity: 0.8; }
.box.is-noop { border-style: dashed; background: transparent; color: var(--muted); }
.dense .box { height: 17px; font-size: 11px; }
.dense .box span { line-height: 15px; }
.bar {
  display: inline-block; width: 72px; height: 8px; margin-right: 8px; border-radius: 4px;
  overflow: hidden; background: var(--line);
}
.bar b { display: block; height: 100%; background: var(--accent); }
.counts { margin: 2px 0; font-size: 14px; }
.counts + figure { margin-top: 12px; }

.heat td { background: color-mix(in oklab, var(--hot) var(--heat), var(--card)); border: 2px solid var(--paper); }
.heat td, .heat thead th { text-align: center; padding: 4px 6px; }
.heat td.none { background: none; color: var(--muted); }
.heat td.framed { outline: 2px solid var(--ink); outline-offset: -3px; }
.heat small { display: block; margin: 0; color: inherit; opacity: 0.8; font-size: 11px; line-height: 1.2; }
.heat thead th { border: 0; }
.heat thead th.attention, .heat thead th.ffn { color: var(--ink); border: 2px solid var(--paper); border-radius: 6px; }
.heat tbody th, .heat th[rowspan] { width: 1%; text-align: left; padding-left: 0; }
.heat thead tr + tr th { padding-left: 6px; }

.kept small { display: block; white-space: normal; line-height: 1.3; margin: 0; }
.kept td, .kept th { vertical-align: top; }
.stages { max-width: 640px; }
.stages .bar { display: block; width: 100%; }
.stages td:nth-child(2) { width: 70%; }
.stages tbody th, .stages td:nth-child(3) { white-space: nowrap; }
.facts { width: auto; }
.points { margin-top: 10px; }
.texts thead th { text-align: left; }
.point-details .columns { padding: 8px 0; }
[data-opens] { cursor: pointer; }
[data-opens]:focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
.differs th, .differs td { font-weight: 650; }
details { border-top: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; }
pre {
  overflow-x: auto; padding: 12px; font-size: 12.5px;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
}
#tip {
  position: fixed; z-index: 2; max-width: 300px; background: var(--ink); color: var(--paper); border-radius: 6px;
  padding: 7px 10px; font-size: 12.5px; white-space: pre-line; pointer-events: none;
}

@media screen and (max-width: 640px) {
  main { padding: 18px 14px 40px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .cards .card:first-child { grid-column: 1 / -1; }
  .cards p { font-size: 17px; line-height: 28px; }
  .card { padding: 11px 12px; }
  table { font-size: 12.5px; }
  th, td { padding: 4px 3px; }
  td { white-space: normal; }
  .budgets tbody th { min-width: 0; }
  td small { display: block; font-size: 11px; }
  td small b { width: auto; }
  thead th { font-size: 11.5px; }
  .columns table { font-size: 11px; }
  .columns thead th { font-size: 10.5px; }
  .columns th, .columns td { padding: 4px 2px; }
  .arch { font-size: 12px; }
  .arch .bar { display: none; }
  .arch th:nth-child(2) { width: 34px; }
  .arch th:nth-child(4) { width: 44px; }
  .box span { padding: 0 5px; }
  .columns .chart text { font-size: 17px; }
  .wide .chart text { font-size: 24px; }
  .panels { grid-template-columns: 1fr 1fr; }
  .panels .chart text { font-size: 18px; }
}
@media print {
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { margin-top: 24px; }
  .columns { grid-template-columns: 1fr 1fr; }
  figure, tr, .card { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  th, td { padding: 3px 5px; }
  table, .note, .counts { font-size: 10.5px; }
  .cards { grid-template-columns: repeat(5, 1fr); gap: 6px; }
  .card { padding: 8px; }
  .cards p, .cards .card:first-child p { font-size: 14px; line-height: 22px; }
}
"""

# A click or Enter on a point of the chart opens its details.
# Touch screens cannot hover. So a tap shows an element's tooltip, until the next tap.
SCRIPT = """
const open = (event) => {
  const box = document.getElementById(event.target.closest("[data-opens]")?.dataset.opens);
  if (!box) return;
  box.open = true;
  box.scrollIntoView({behavior: "smooth", block: "nearest"});
};
document.addEventListener("click", open);
document.addEventListener("keydown", (event) => { if (event.key === "Enter") open(event); });
document.addEventListener("click", (event) => {
  document.getElementById("tip")?.remove();
  const target = event.target.closest("[title], .chart *");
  const words = target?.getAttribute("title") || target?.querySelector("title")?.textContent;
  if (!words) return;
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  tip.textContent = words;
  tip.style.left = Math.max(8, Math.min(event.clientX, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
});
"""
