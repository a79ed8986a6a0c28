"""The page's style sheet and its one script. No font, picture or address from elsewhere."""

STYLE = """
:root { color-scheme: light; --paper: #fbfbfa; --card: #ffffff; --ink: #16191d; --muted: #5d6672; --line: #dfe3e8;
  --attention: #a9c3f5; --ffn: #9ddcc9; --linear: #f5cf7f; --other: #d5b8ef; --accent: #2757c4; --good: #0d7a5f; --hot: #f07a45;
  --early: #a9c3f5; --late: #14316f; --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #101317; --card: #181c22; --ink: #e9edf2;
  --muted: #9aa5b3; --line: #2c333d; --attention: #2c4f96; --ffn: #1c6b57; --linear: #84621a; --other: #63418a; --accent: #86aaff;
  --good: #4fc9a4; --hot: #a8471a; --early: #2f4d8c; --late: #c3d5ff; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
header h1 { font-size: clamp(24px, 4vw, 34px); line-height: 1.2; margin: 0; overflow-wrap: anywhere; letter-spacing: -0.01em; }
h1 span { color: var(--muted); font-weight: 400; }
.eyebrow { margin: 0 0 4px; color: var(--accent); font-weight: 600; font-size: 13px; }
.note { color: var(--muted); margin: 6px 0 12px; max-width: 80ch; }
section { margin-top: 44px; } section > h2 { font-size: 21px; margin: 0 0 10px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 22px 0 8px; } small { color: var(--muted); font-size: 12px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 18px; font-size: 13.5px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(186px, 1fr)); gap: 12px; margin-top: 22px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.card h2 { font-size: 13px; font-weight: 500; color: var(--muted); margin: 0; } .card h3 { margin: 0 0 6px; }
.cards .card p { font-size: 24px; font-weight: 650; line-height: 1.25; margin: 4px 0; letter-spacing: -0.02em; }
.cards .card:first-child p { font-size: 34px; line-height: 1; color: var(--good); }
.card small { display: block; line-height: 1.35; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px 28px; align-items: start; }
.columns > * { min-width: 0; }
figure { margin: 0; } figcaption { font-size: 13px; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; font-weight: 400; }
thead th { color: var(--muted); font-size: 12.5px; vertical-align: bottom; } tbody th, th:first-child { text-align: left; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--paper); } td.text { text-align: left; white-space: normal; }
td small { margin-left: 2px; }
.chart { display: block; width: 100%; height: auto; } .chart text { fill: var(--muted); font-size: 13px; }
.chart text.strong { fill: var(--ink); font-weight: 650; }
.grid { stroke: var(--line); } .axis { stroke: var(--muted); }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.frontier-line { stroke-dasharray: 2 4; } .point { fill: var(--accent); } .parent-dot { fill: var(--muted); }
.chosen-dot { fill: transparent; stroke: var(--good); stroke-width: 3; } .cross { stroke: var(--bad); stroke-width: 2; fill: none; }
.depth.line { stroke: color-mix(in oklab, var(--late) var(--depth), var(--early)); stroke-width: 1.6; }
.term-kl { stroke: var(--good); } .term-cosine { stroke: var(--hot); } .term-lm { stroke: var(--muted); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; color: var(--muted); font-size: 12.5px; margin: 8px 0; }
.legend span { display: inline-flex; align-items: center; gap: 6px; } .keys { display: flex; flex-wrap: wrap; gap: 0 22px; }
.swatch { width: 14px; height: 12px; border-radius: 3px; display: inline-block; }
.attention { background: var(--attention); } .ffn { background: var(--ffn); } .linear { background: var(--linear); }
.other { background: var(--other); } .swatch.noop { border: 1px dashed var(--muted); } .swatch.frame { border: 2px solid var(--ink); }
.swatch.point { background: var(--accent); border-radius: 50%; width: 11px; height: 11px; }
.swatch.chosen { border: 3px solid var(--good); border-radius: 50%; width: 14px; height: 14px; }
.swatch.refused { background: linear-gradient(45deg, transparent 42%, var(--bad) 42% 58%, transparent 58%),
  linear-gradient(-45deg, transparent 42%, var(--bad) 42% 58%, transparent 58%); width: 12px; }
.swatch.term-loss { background: var(--accent); } .swatch.term-kl { background: var(--good); }
.swatch.term-cosine { background: var(--hot); } .swatch.term-lm { background: var(--muted); }
.ramp { width: 120px; height: 10px; border-radius: 5px; background: linear-gradient(90deg, var(--card), var(--hot));
  border: 1px solid var(--line); } .ramp.depth { background: linear-gradient(90deg, var(--early), var(--late)); }
.arch { table-layout: fixed; } .arch th, .arch td { border: 0; padding: 2px 4px; }
.arch th { text-align: center; } .arch thead th:first-child { text-align: right; } .arch thead th:nth-child(3) { text-align: left; }
.arch th:nth-child(2) { width: 46px; } .arch th:nth-child(4) { width: 130px; text-align: left; }
.arch tbody th { color: var(--muted); background: linear-gradient(var(--line), var(--line)) center / 1px 100% no-repeat; }
.box { position: relative; height: 27px; border: 1px solid color-mix(in oklab, var(--muted) 45%, var(--paper)); border-radius: 5px;
  overflow: hidden; background: var(--card); } .dense .box { height: 17px; font-size: 11px; line-height: 15px; }
.box > i { position: absolute; inset: 0 auto 0 0; } .left .box > i { inset: 0 0 0 auto; }
.box span { position: absolute; inset: 0; padding: 0 8px; text-align: left; line-height: 25px; } .dense .box span { line-height: 15px; }
.left .box span { text-align: right; } .box em { font-style: normal; opacity: 0.75; }
.is-noop { border-style: dashed; background: transparent; } .is-noop span { color: var(--muted); }
.arch .time { text-align: left; font-size: 12.5px; color: var(--muted); }
.bar { display: inline-block; width: 72px; height: 8px; border-radius: 4px; background: var(--line); margin-right: 8px; overflow: hidden; }
.bar b { display: block; height: 100%; background: var(--accent); }
.counts { margin: 2px 0; } .counts + figure { margin-top: 12px; }
.heat td { background: color-mix(in oklab, var(--hot) var(--heat), var(--card)); border: 2px solid var(--paper); text-align: center;
  padding: 4px 6px; } .heat td.none { background: none; color: var(--muted); } .heat td.framed { outline: 2px solid var(--ink);
  outline-offset: -3px; } .heat small { display: block; margin: 0; color: inherit; opacity: 0.75; font-size: 11px; line-height: 1.2; }
.heat thead th { text-align: center; border: 0; } .heat thead th.attention, .heat thead th.ffn { color: var(--ink);
  border: 2px solid var(--paper); border-radius: 6px; } .heat th:first-child { width: 1%; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; } .stages { max-width: 640px; } .stages .bar { width: 100%; }
.stages td:nth-child(2) { width: 70%; } .facts { width: auto; } .facts td { text-align: left; white-space: normal; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; font-size: 12.5px; }
#tip { position: fixed; z-index: 2; max-width: 300px; background: var(--ink); color: var(--paper); border-radius: 6px; padding: 7px 10px;
  font-size: 12.5px; white-space: pre-line; pointer-events: none; }
@media (max-width: 640px) { main { padding: 18px 14px 40px; } .cards { grid-template-columns: 1fr 1fr; } .cards .card:first-child {
  grid-column: 1 / -1; } .cards .card p { font-size: 19px; } .card { padding: 11px 12px; } .arch .bar { display: none; }
  .arch th:nth-child(4) { width: 46px; } .arch th:nth-child(2) { width: 34px; } .arch { font-size: 12px; } .box span { padding: 0 5px; }
  .chart text { font-size: 15px; } .panels { grid-template-columns: 1fr 1fr; } th, td { padding: 5px 6px; } }
@media print { body { font-size: 11px; } main { max-width: none; padding: 0; } nav { display: none; } figure, tr, .card { break-inside: avoid; }
  section { margin-top: 24px; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; } }
"""

# Touch screens have no hover: a tap shows an element's tooltip until the next one.
SCRIPT = """
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
