"""The style sheet of a report; LIGHT and DARK stand for the colours of lines."""

STYLE = """\
:root { color-scheme: light dark; --ground: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #545d68; --edge: #d5dae0;
  --change: #b42318; --try: #1f5fa8; --fine: #146c2e; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1d2125; --ink: #e6e9ec;
  --soft: #a7b0ba; --edge: #383f47;  --change: #ff8a7a; --try: #7cb8f5; --fine: #6fcf8a; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; } h1 { font-size: 1.6rem; margin: 0; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 36px 0 12px; } p { margin: 6px 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.runs { list-style: none; padding: 0; margin: 14px 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.runs li, figure { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px;
  margin: 0; min-width: 0; }
.runs strong { overflow-wrap: anywhere; }
.mark { display: inline-block; width: 26px; height: 10px; margin-right: 8px; vertical-align: baseline; }
dl { display: grid; grid-template-columns: minmax(0, auto) minmax(50%, 1fr); gap: 2px 14px; margin: 8px 0 0; }
dt, dd { overflow-wrap: anywhere; } dt { color: var(--soft); }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.advice { padding: 0; margin: 0; list-style: none; }
.advice li { border-left: 4px solid var(--edge); padding: 6px 0 6px 12px; margin: 8px 0; }
.advice b { margin-right: 6px; } .change { border-color: var(--change) !important; } .change b { color: var(--change); }
.try { border-color: var(--try) !important; } .try b { color: var(--try); }
.fine { border-color: var(--fine) !important; } .fine b { color: var(--fine); }
.two, .three { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
h3 { font-size: 1rem; margin: 0 0 4px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; max-width: 640px; margin: 4px auto; }
svg text { font-family: inherit !important; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } .wide:focus-visible, summary:focus-visible { outline: 2px solid var(--try); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--edge); white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; } .differs td { font-weight: 600; }
footer { padding: 28px 20px; color: var(--soft); font-size: .85rem; }
"""
