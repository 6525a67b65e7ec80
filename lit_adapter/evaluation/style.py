"""The look of HTML files (`document`)."""

STYLE = """
:root {
  color-scheme: light dark; --ink: #1d2430; --dim: #5d6776; --page: #ffffff; --card: #f5f7fa;
  --line: #d8dee6; --heat: #1f6fb4; --good: #1a7f4b; --bad: #b3372f; --warn: #fff4d6;
  --series-0: #7b8794; --series-1: #1f6fb4; --series-2: #d9742b; --series-3: #2c8a57;
  --series-4: #8a55b8; --series-5: #b83a5e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6eaf0; --dim: #9aa5b4; --page: #14181f; --card: #1d232d; --line: #333c49; --heat: #5ab0f2;
    --good: #5fce94; --bad: #f08a80; --warn: #3a3115; --series-0: #98a4b3; --series-1: #5ab0f2;
    --series-2: #f0a062; --series-3: #62c995; --series-4: #bf95e6; --series-5: #ef83a2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
.dim { color: var(--dim); font-size: .88rem; }
.lead { font-size: 1.08rem; margin: .5rem 0; }
.warning { background: var(--warn); padding: .5rem .8rem; border-radius: 6px; }
.plots { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; }
.plots > div {
  background: var(--card); border-radius: 8px; padding: .8rem 1rem; max-width: 100%; overflow-x: auto;
}
svg { max-width: 100%; height: auto; }
svg text { fill: var(--dim); font: 11.5px system-ui, sans-serif; }
svg text.on-heat { fill: var(--page); }
svg .grid { stroke: var(--line); }
.whisker { stroke: var(--ink); fill: none; }
.legend { margin: .2rem 0 0; font-size: .85rem; }
.legend span { margin-right: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td {
  padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
th { color: var(--dim); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
td, th { white-space: nowrap; }
.sample { background: var(--card); border-radius: 8px; padding: .7rem 1rem; margin: .6rem 0; }
.sides {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem;
  margin-top: .4rem;
}
pre {
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace;
}
.right { color: var(--good); }
.wrong { color: var(--bad); }
"""
