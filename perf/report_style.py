"""How does the report's page look? Readable on a phone and a wide screen, by day and by night."""

# Colours are variables that perf/report.py writes before it, from perf/drawing.py.
STYLE = """\
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:1.7rem;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.35rem;margin:3rem 0 .4rem;padding-top:1rem;border-top:2px solid var(--ink)}
h3{font-size:1.06rem;margin:0 0 .7rem;line-height:1.35}
small{color:var(--faint);font-weight:normal;font-size:.82em}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.files{list-style:none;margin:0;padding:0}
.files li{margin:.25rem 0;overflow-wrap:anywhere}
.files b{margin-right:.35em}
.files span{display:block;color:var(--faint);font-size:.86rem}
figure{margin:2.2rem 0 0;padding:1.2rem 0 0;border-top:1px solid var(--grid)}
figure svg{display:block;width:100%;height:auto}
figcaption{color:var(--faint);font-size:.86rem;margin:.5rem 0 0;max-width:52rem}
.narrow{display:none}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;margin:.9rem 0 .4rem;
 font-variant-numeric:tabular-nums}
th,td{padding:.26rem .7rem;text-align:right;white-space:nowrap;vertical-align:baseline}
th:first-child,td.text,th.text,.figures th:nth-child(2){text-align:left}
th:first-child,td:first-child{padding-left:0}
thead th{border-bottom:1px solid var(--faint);font-weight:600;font-size:.84em}
tbody tr+tr>*{border-top:1px solid var(--grid)}
.figures tbody tr+tr>*{border-top:0}
.figures tbody tr.first>*{border-top:1px solid var(--grid)}
.figures tbody td{padding-top:.1rem;padding-bottom:.1rem}
tbody th{font-weight:600}
.range{color:var(--faint)}
.ratio{color:var(--share);margin-left:.4em}
.environment td{white-space:normal;overflow-wrap:anywhere}
.environment th{font-weight:normal;color:var(--faint)}
details{margin:.9rem 0}
summary{cursor:pointer;font-weight:600}
details figure:first-of-type{border-top:0;margin-top:.6rem}
p{max-width:52rem}
@media (max-width:640px){
 main{padding:18px 14px 40px}
 h1{font-size:1.4rem}
 .wide{display:none}
 .narrow{display:block}
 th,td{padding:.24rem .5rem}
 tbody th small{display:none}
 .figures{font-size:.72rem}
 .figures code{font-size:.94em}
 .figures th,.figures td{padding-left:.25rem;padding-right:.25rem}
 .figures th:first-child{padding-left:0}
}
@media print{main{max-width:none}.scroll{overflow:visible}}
"""
