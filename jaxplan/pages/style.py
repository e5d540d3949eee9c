"""What a page looks like and how it answers: one style sheet and one script, put into the page as they are."""

CSS = """
:root{color-scheme:light dark;--bg:#fbfbfc;--fg:#1b1f27;--soft:#59616f;--line:#dfe3ea;--card:#fff;--mark:#2458c5;--work:#4a7fd6;
--move:#d1732b;--a0:#1f6fd0;--a1:#b3541e;--a2:#2c7a4b;--a3:#8a3fb0;--a4:#a8324f;--a5:#5f6b1f}
@media (prefers-color-scheme:dark){:root{--bg:#14171d;--fg:#e7eaf0;--soft:#a3acba;--line:#2d333e;--card:#1b2028;--mark:#8db4ff;
--work:#6f9fe8;--move:#e9955a;--a0:#7db3f5;--a1:#f0a06c;--a2:#79cf9b;--a3:#cf98ec;--a4:#f08aa4;--a5:#c9d57a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1060px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 4px}
p{margin:0 0 10px}.soft,.sub{color:var(--soft)}.sub{font-size:13.5px;margin-bottom:12px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:16px}
code,.mono{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0 0}
.figures div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.figures dt{color:var(--soft);font-size:13px}.figures dd{margin:0;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--soft);font-weight:500;border-bottom:1px solid var(--line);padding:4px 12px 4px 0;white-space:nowrap}
td{border-bottom:1px solid var(--line);padding:5px 12px 5px 0;vertical-align:top}
tr:last-child td{border-bottom:0}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.mesh{display:grid;grid-template-columns:minmax(180px,280px) 1fr;gap:20px;align-items:start}
.axis{padding:0 0 10px}.axis b{margin-right:6px}
.d{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:nowrap}
.d i{font-style:normal;color:var(--soft)}
.ax{border-radius:4px;padding:0 4px;font-weight:600;border:1px solid currentColor;font-size:12px;margin-left:2px}
.a0{color:var(--a0)}.a1{color:var(--a1)}.a2{color:var(--a2)}.a3{color:var(--a3)}.a4{color:var(--a4)}.a5{color:var(--a5)}
.block{border-left:3px solid transparent;margin:2px 0}
.block.many{border:1px solid var(--line);border-left:3px solid var(--mark);border-radius:8px;padding:4px 8px 4px 8px;margin:10px 0}
.block>h3{font-size:13px;font-weight:600;color:var(--mark);margin:4px 0 4px 4px}
.steps{list-style:none;margin:0;padding:0}
.step{display:flex;align-items:stretch}
.lanes{display:flex;flex:none}.lane{width:9px;position:relative}
.lane:before{content:"";position:absolute;left:4px;border-left:1.5px solid var(--soft);opacity:.55}
.lane.pass:before,.lane.both:before{top:0;bottom:0}.lane.start:before{top:17px;bottom:0}.lane.end:before{top:0;height:17px}
.lane.start:after,.lane.end:after,.lane.both:after{content:"";position:absolute;left:4px;right:0;top:17px;border-top:1.5px solid var(--soft);opacity:.55}
.step details{flex:1;min-width:0;border-bottom:1px solid var(--line)}.steps li:last-child details{border-bottom:0}
summary{cursor:pointer}
.step summary{display:grid;grid-template-columns:minmax(120px,1.3fr) minmax(120px,1.2fr) 86px;gap:4px 12px;padding:6px 6px;align-items:center;list-style:none;border-radius:6px}
.step summary::-webkit-details-marker{display:none}
summary:hover{background:color-mix(in srgb,var(--mark) 8%,transparent)}
:focus-visible{outline:2px solid var(--mark);outline-offset:1px;border-radius:6px}
.op b{font-weight:600}.op small{color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
.bar{height:7px;border-radius:4px;background:var(--line);overflow:hidden;display:flex;min-width:40px}
.bar span{display:block;height:100%}.bar .w{background:var(--work)}.bar .m{background:var(--move)}
.moves{grid-column:1/-1;display:flex;flex-wrap:wrap;gap:4px 8px}
.move{font-size:12.5px;border:1px solid color-mix(in srgb,var(--move) 55%,transparent);background:color-mix(in srgb,var(--move) 10%,transparent);border-radius:6px;padding:0 7px}
.more{padding:2px 6px 10px;font-size:13.5px}
.lines{display:grid;grid-template-columns:minmax(110px,max-content) 1fr max-content;gap:7px 12px;align-items:center;font-size:13.5px}
.lines .bar{height:12px}
.key span{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 0}.key{margin-right:14px}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}svg{max-width:100%;display:block}
input[type=range]{width:100%;accent-color:var(--mark);margin:8px 0}
output{display:block;font-weight:600}
.at{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:8px;margin:8px 0}
.at div span{display:block;color:var(--soft);font-size:13px}.at div b{font-variant-numeric:tabular-nums}
tr.now td{background:color-mix(in srgb,var(--mark) 12%,transparent)}
footer{color:var(--soft);font-size:13px;margin-top:22px}
.skip{position:absolute;left:-999px}.skip:focus{left:12px;top:8px;background:var(--card);padding:6px 10px;z-index:1}
@media (max-width:640px){main{padding:18px 12px 40px}section{padding:14px 12px}.mesh{grid-template-columns:1fr}
.step summary{grid-template-columns:1fr 66px}.step summary .res{grid-column:1/-1}.step summary .cost{grid-row:1;grid-column:2}
.lines{grid-template-columns:1fr max-content}.lines .bar{grid-column:1/-1;order:3}.lines>*{min-width:0}h1{font-size:20px}}
@media print{section{break-inside:avoid}}
"""

SCRIPT = """
(function(){
"use strict";
// arrow keys walk through the steps of the program
var steps=Array.prototype.slice.call(document.querySelectorAll(".step summary"));
steps.forEach(function(s,i){s.addEventListener("keydown",function(e){
 var to={ArrowDown:i+1,ArrowUp:i-1,Home:0,End:steps.length-1}[e.key];
 if(to!==undefined&&steps[to]){e.preventDefault();steps[to].focus();}
});});
// the slider over the sweep
var slider=document.getElementById("slider"),data=document.getElementById("sweep-data");
if(slider&&data){
 var points=JSON.parse(data.textContent),rows=document.querySelectorAll("#sweep-table tbody tr"),dots=document.querySelectorAll("#sweep-plot circle");
 var put=function(id,text){document.getElementById(id).textContent=text;};
 var show=function(){
  var i=+slider.value,p=points[i];
  put("at-label",p.at);put("at-seconds",p.seconds);put("at-sent",p.sent);put("at-peak",p.peak);put("at-does",p.does);
  slider.setAttribute("aria-valuetext",p.at+": "+p.seconds+", "+p.sent+" sent, "+p.peak+" at the peak");
  rows.forEach(function(r,k){r.className=k===i?"now":"";});
  dots.forEach(function(d,k){d.setAttribute("r",k===i?6:3.5);});
 };
 slider.addEventListener("input",show);show();
}
// what lives at a moment, under the pointer or by arrow keys
var plot=document.getElementById("memory-plot"),mdata=document.getElementById("memory-data");
if(plot&&mdata){
 var m=JSON.parse(mdata.textContent),cursor=document.getElementById("memory-cursor"),tell=document.getElementById("memory-at"),at=m.worst;
 var move=function(i){
  at=Math.max(0,Math.min(m.told.length-1,i));
  var x=m.left+(at+.5)*m.width/m.told.length;
  cursor.setAttribute("x1",x);cursor.setAttribute("x2",x);tell.textContent=m.told[at];
 };
 plot.addEventListener("pointermove",function(e){var b=plot.getBoundingClientRect();move(Math.floor(((e.clientX-b.left)*m.view/b.width-m.left)/m.width*m.told.length));});
 plot.addEventListener("keydown",function(e){
  var by={ArrowRight:1,ArrowLeft:-1,PageUp:20,PageDown:-20}[e.key];
  if(by){e.preventDefault();move(at+by);}else if(e.key==="Home"||e.key==="End"){e.preventDefault();move(e.key==="Home"?0:m.told.length-1);}
 });
 move(at);
}
})();
"""
