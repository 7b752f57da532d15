"""The pages' look and layout. Strings, not files: Flower's bundle carries python only."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --paper:#fbfaf7; --card:#ffffff; --ink:#1d2429; --dim:#5a646c; --rule:#dcd9d1;
  --t1:#0067a5; --t2:#b84a00; --t3:#00735a; --t4:#94476f; --t5:#7a5c00; --heat:#58aede; --lost:#c03500; }
@media (prefers-color-scheme: dark) { :root { --paper:#14181b; --card:#1b2126; --ink:#e9e6e0; --dim:#a3adb5;
  --rule:#333c43; --t1:#66bdf0; --t2:#f0a04b; --t3:#4fcfa4; --t4:#e09cc4; --t5:#e3c94f; --heat:#1c6b9b;
  --lost:#ff9d5c; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--paper); color:var(--ink); 
  font:16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width:1120px; margin:0 auto; padding:clamp(20px,4vw,52px) clamp(16px,4vw,40px) 64px; }
h1 { font-size:clamp(1.5rem,1.05rem + 2.1vw,2.45rem); line-height:1.2; letter-spacing:-.015em; margin:.3em 0 .5em; 
  max-width:26em; text-wrap:balance; }
h2 { font-size:1.2rem; margin:2.6em 0 .3em; letter-spacing:-.005em; }
p { margin:.3em 0 .9em; max-width:44em; }
.eyebrow, .dim, figcaption small, .note { color:var(--dim); }
.eyebrow { font-size:.85rem; letter-spacing:.04em; margin:0; }
.lead { font-size:1.1rem; }
.going { border-left:4px solid var(--t2); padding:.1em 0 .1em .8em; }
.keys { display:grid; grid-template-columns:repeat(auto-fit,minmax(140px,1fr)); gap:12px; margin:1.6em 0 0; padding:0; }
.keys div { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:12px 14px; }
.keys dt { font-size:.82rem; color:var(--dim); }
.keys dd { margin:0; font-size:1.55rem; font-weight:650; line-height:1.25; font-variant-numeric:tabular-nums; }
.keys dd small { display:block; font-size:.8rem; font-weight:400; color:var(--dim); line-height:1.35; }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr)); gap:16px; margin:1em 0; }
figure { margin:0; background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:14px 14px 6px;
  break-inside:avoid; max-width:620px; }
figcaption { font-weight:600; margin-bottom:4px; }
figcaption small { font-weight:400; }
svg.chart { width:100%; height:auto; display:block; overflow:visible; }
svg text { font-size:12px; fill:var(--ink); font-variant-numeric:tabular-nums; }
svg text.dim { fill:var(--dim); }
.grid { stroke:var(--rule); stroke-width:1; }
.ref { stroke:var(--dim); stroke-width:1.3; stroke-dasharray:5 4; }
.span { stroke:var(--dim); stroke-width:1; opacity:.45; }
.line { fill:none; stroke-width:2.2; stroke-linejoin:round; stroke-linecap:round; }
.line.t1,.dot.t1 { stroke:var(--t1); } .line.t2,.dot.t2 { stroke:var(--t2); } .line.t3,.dot.t3 { stroke:var(--t3); }
.line.t4,.dot.t4 { stroke:var(--t4); } .line.t5,.dot.t5 { stroke:var(--t5); }
.dot { fill:var(--card); stroke-width:1.6; }
.bar.t1, text.name.t1 { fill:var(--t1); } .bar.t2, text.name.t2 { fill:var(--t2); } text.name.t3 { fill:var(--t3); }
text.name.t4 { fill:var(--t4); } text.name.t5 { fill:var(--t5); }
svg text.name { font-weight:600; }
svg.spark { width:82px; height:20px; vertical-align:-4px; }
svg.spark .line { stroke-width:1.6; }
.wide { overflow-x:auto; margin:.8em 0; border:1px solid var(--rule); border-radius:10px; background:var(--card); }
table { border-collapse:collapse; width:100%; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { padding:6px 12px; text-align:right; white-space:nowrap; border-bottom:1px solid var(--rule); }
tr:last-child > * { border-bottom:0; }
th { font-weight:600; } thead th { color:var(--dim); font-weight:500; font-size:.82rem; }
th:first-child, td.text, th.text { text-align:left; }
td.free { white-space:normal; min-width:16em; text-align:left; }
tbody th { font-weight:500; position:sticky; left:0; background:var(--card); }
td.skills { white-space:normal; text-align:left; min-width:13em; color:var(--dim); font-size:.85rem; }
.heat td { text-align:center; padding:6px 6px; min-width:3.2em; print-color-adjust:exact;
  background:color-mix(in srgb, var(--heat) var(--v,0%), var(--card)); border:1px solid var(--card); }
.heat th { border-bottom:0; } .heat thead th:not(:first-child) { text-align:center; }
.cell { fill:color-mix(in srgb, var(--heat) var(--v,0%), var(--card)); stroke:var(--rule); print-color-adjust:exact; }
svg text.value { font-weight:600; font-size:13px; }
figure.broad { grid-column:1/-1; max-width:none; }
.scroll { overflow-x:auto; padding-bottom:8px; }
.heat .sep { border-left:6px solid var(--card); }
.tasks td { min-width:5.2em; line-height:1.25; } .tasks td.sep { font-weight:600; }
.tasks small { display:block; font-size:.78rem; font-weight:400; color:var(--dim); }
.tasks td small { color:var(--ink); }
.tasks td.ahead { color:var(--dim); --v:0% !important; }
.tasks td.own { box-shadow:inset 0 0 0 2px var(--ink); font-weight:650; }
.tasks td.lost { box-shadow:inset 0 0 0 3px var(--lost); font-weight:650; }
.forgotten { max-width:52em; padding-left:1.2em; } .forgotten li::marker { content:"▼ "; color:var(--lost); }
td.mean { font-weight:650; }
.aside > * { color:var(--dim); font-style:italic; }
.meter { position:relative; height:12px; width:clamp(90px,18vw,220px); 
  background:color-mix(in srgb, var(--rule) 55%, transparent); border-radius:3px; }
.meter i { position:absolute; inset:0 auto 0 0; background:var(--t1); border-radius:3px; print-color-adjust:exact; }
.aside .meter i { background:var(--dim); }
.meter b { position:absolute; top:3px; height:6px; border:solid var(--ink); border-width:0 1.5px;
  background:linear-gradient(var(--ink),var(--ink)) center/100% 1.5px no-repeat; }
pre { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:14px 16px; overflow-x:auto;
  font-size:.88rem; }
code, pre { font-family:ui-monospace, "Cascadia Code", "DejaVu Sans Mono", Menlo, monospace; }
details { margin:.6em 0; } summary { cursor:pointer; color:var(--t1); }
footer { margin-top:3em; color:var(--dim); font-size:.85rem; border-top:1px solid var(--rule); padding-top:1em; }
@media print { body { font-size:11px; } main { padding:0; max-width:none; } details > * { display:block; }
  .wide { overflow:visible; } h2 { break-after:avoid; } tr { break-inside:avoid; } }
"""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{% block title %}{{ title }}{% endblock %}</title>
<style>{{ style|safe }}</style></head><body><main>
"""

_TABLE = """{% macro grid(table) %}
{% if table.title %}<p class="note"><strong>{{ table.title }}</strong></p>{% endif %}
<div class="wide"><table><thead><tr>
{% for head, css in table.heads %}<th class="{{ css }}">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr>{% for cell, css in row %}
{% if loop.first %}<th scope="row">{{ cell }}</th>
{% else %}<td class="{{ css }}">{% if css == "svg" %}{{ cell|safe }}{% else %}{{ cell }}{% endif %}</td>
{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}"""

REPORT: Final = (
    _TABLE
    + _HEAD
    + """
<header>
<p class="eyebrow">{{ eyebrow }}</p>
<h1>{{ headline }}</h1>
{% if lead %}<p class="lead">{{ lead }}</p>{% endif %}
{% if going %}<p class="going">{{ going }}</p>{% endif %}
</header>
{% if keys %}<dl class="keys">{% for name, value, note in keys %}
<div><dt>{{ name }}</dt><dd>{{ value }}{% if note %}<small>{{ note }}</small>{% endif %}</dd></div>{% endfor %}
</dl>{% endif %}
{% if tasks %}
<h2>Tasks</h2>
<p class="dim">{{ tasks.text }}</p>
{% if tasks.matrix %}
<div class="wide"><table class="heat tasks"><thead><tr><th></th>
{% for head in tasks.matrix.heads %}<th{% if loop.last %} class="sep"{% endif %}>{{ head }}</th>{% endfor %}
</tr></thead><tbody>{% for row in tasks.matrix.rows %}
<tr><th scope="row">{{ row.name }}{% if row.note %}<small>{{ row.note }}</small>{% endif %}</th>
{% for value, text, change, css, title in row.cells %}
<td class="{{ css }}" style="--v:{{ value }}%" title="{{ title }}">{{ text }}
{%- if change %}<small>{{ change }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if tasks.forgotten %}<ul class="forgotten">{% for said in tasks.forgotten %}<li>{{ said }}</li>{% endfor %}</ul>
{% elif tasks.none %}<p>{{ tasks.none }}</p>{% endif %}
{{ grid(tasks.measures) }}
{% if tasks.chart %}<div class="charts"><figure>
<figcaption>Score of each task <small>{{ tasks.caption }}</small></figcaption>{{ tasks.chart|safe }}
</figure></div>{% endif %}
{% endif %}
{% for part in tasks.parts %}
<h2>{{ part.heading }}</h2>
<p class="dim">{{ part.text }}</p>
{% if part.figures %}<div class="charts">{% for caption, note, svg, css in part.figures %}
<figure class="{{ css }}"><figcaption>{{ caption }}<br/><small>{{ note }}</small></figcaption>
<div class="scroll">{{ svg|safe }}</div></figure>
{% endfor %}</div>{% endif %}
{% for table in part.tables %}{{ grid(table) }}{% endfor %}
{% if part.note %}<p class="note">{{ part.note }}</p>{% endif %}
{% endfor %}
{% endif %}
{% for section in sections if section.charts %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p class="dim">{{ section.text }}</p>{% endif %}
<div class="charts">{% for caption, note, svg in section.charts %}
<figure><figcaption>{{ caption }} <small>{{ note }}</small></figcaption>{{ svg|safe }}</figure>{% endfor %}
</div>
{% if loop.first and table %}
<h2>{{ table.title }}</h2>
<p class="dim">{{ table.text }}</p>
<div class="wide"><table class="heat"><thead><tr><th>{{ table.corner }}</th>
{% for round in table.rounds %}<th>{{ round }}</th>{% endfor %}
{% for name in table.references %}<th{% if loop.first %} class="sep"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr><th scope="row">{{ row.name }}</th>
{% for value, text in row.cells %}<td style="--v:{{ value }}%">{{ text }}</td>{% endfor %}
{% for value, text in row.references %}
<td style="--v:{{ value }}%"{% if loop.first %} class="sep"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% endfor %}
{% for heading, part in (("The clients", clients), ("Personal adapters", personal)) if part %}
<h2>{{ heading }}</h2>
<p class="dim">{{ part.text }}</p>
{% for table in part.tables %}{{ grid(table) }}{% endfor %}
{% endfor %}
{% if refused %}
<h2>Answers that were not taken</h2>
<p class="dim">{{ refused.text }}</p>
{% if refused.rows %}<div class="wide"><table><thead><tr><th>round</th>
<th class="text">client</th><th class="text">rule</th><th class="text">what came</th></tr></thead>
<tbody>{% for round, client, rule, detail in refused.rows %}
<tr><th scope="row">{{ round }}</th><td class="text">{{ client }}</td>
<td class="text">{{ rule }}</td><td class="free">{{ detail }}</td></tr>{% endfor %}</tbody></table></div>{% endif %}
{% endif %}
<h2>Use the adapter</h2>
<p class="dim">{{ usage.text }}</p>
<pre><code>{{ usage.code }}</code></pre>
<h2>Settings</h2>
<p class="dim">{{ settings.text }}</p>
{% if settings.changed %}<div class="wide"><table>
<thead><tr><th>setting</th><th class="text">value</th><th class="text">default</th></tr></thead><tbody>
{% for key, value, default in settings.changed %}
<tr><th scope="row">{{ key }}</th>
<td class="free">{{ value }}</td><td class="free dim">{{ default }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
<details><summary>All settings, as config.toml</summary><pre><code>{{ settings.toml }}</code></pre></details>
<footer>{{ footer }}</footer>
</main></body></html>
"""
)

COMPARISON: Final = (
    _HEAD.replace("{{ title }}", "Methods compared")
    + """
<p class="eyebrow">fedlora compare</p>
<h1>Methods compared</h1>
<p class="dim">{% if one %}One seed.{% else %}Mean ± standard deviation over {{ seeds }} seeds.{% endif %}
Scores are those of the last round, never of the best. Rows in italics are no federated method: they show what the
base knows, what a client learns alone, and what training on all the data in one place would give.</p>
<div class="wide"><table><thead><tr>
{% for head in heads %}<th>{{ head }}</th>
{% if loop.index == 2 %}<th class="text"></th>{% endif %}{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr{% if row.aside %} class="aside"{% endif %}>
{% for cell in row.cells %}{% if loop.first %}<th scope="row">{{ cell }}</th>
{% else %}<td>{{ cell }}</td>{% endif %}
{% if loop.index == 2 %}<td class="text">{% if row.width is not none %}
<div class="meter" role="img" aria-label="{{ cell }}">
<i style="width:{{ row.width }}%"></i>
{% if row.sd %}<b style="left:{{ row.left }}%;width:{{ row.spread }}%"></b>{% endif %}</div>{% endif %}</td>
{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if curve %}<h2>What a score costs</h2>
<p class="dim">Each line goes through the codecs of one method; bytes are those of a whole run, up and down.</p>
{{ curve }}{% endif %}
</main></body></html>
"""
)

WAYS_PAGE: Final = (
    _HEAD.replace("{{ title }}", "Ways to learn tasks compared")
    + """
<p class="eyebrow">fedlora compare</p>
<h1>What each way keeps of earlier tasks</h1>
<p class="dim">{% if one %}One seed.{% else %}Means over {{ seeds }} seeds.{% endif %}
Every line is one task; along the axis tasks are trained and sealed one after another. Below, in per cent: the score of
the task in the column after the tasks of the row. A frame marks the task that the row has just learnt, ▼ what is more
than 5 points below its best so far{% if not one %} in most seeds{% endif %}. Grey: not learnt yet.</p>
<div class="charts">{% for way in ways %}
<figure><figcaption>{{ way.name }} <small>{{ way.note }}</small></figcaption>{{ way.chart|safe }}
{% if way.cut %}<p class="note">Lines of the first {{ way.cut }} tasks.</p>{% endif %}
<div class="wide"><table class="heat tasks"><thead><tr><th></th>
{% for head in way.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in way.rows %}<tr><th scope="row">{{ row.name }}</th>
{% for value, text, css, title in row.cells %}
<td class="{{ css }}" style="--v:{{ value }}%" title="{{ title }}">{{ text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></figure>{% endfor %}
</div>
<h2>All measures</h2>
<p class="dim">Per cent and points{% if not one %}, mean ± standard deviation over {{ seeds }} seeds{% endif %}; bytes
and time of a whole run.</p>
<div class="wide"><table style="font-size:.8rem"><thead><tr>
{% for head in heads %}<th>{% for line in head.replace("bytes ", "bytes, ").split(", ") %}
{%- if not loop.first %}<br/>{% endif %}{{ line }}
{%- endfor %}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}
{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}{% set mean, pm, sd = cell.partition(" ± ") %}
<td>{{ mean }}{% if sd %}<br/><small class="note">± {{ sd }}</small>{% endif %}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<div class="wide"><table><tbody>{% for name, what in told %}
<tr><th scope="row">{{ name }}</th><td class="free">{{ what }}</td></tr>{% endfor %}</tbody></table></div>
</main></body></html>
"""
)
