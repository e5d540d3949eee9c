(function(){
"use strict";
// arrow keys walk through the steps of the program
var steps=Array.prototype.slice.call(document.querySelectorAll(".step summary"));
steps.forEach(function(s,i){s.addEventListener("keydown",function(e){
 var to={ArrowDown:i+1,ArrowUp:i-1,Home:0,End:steps.length-1}[e.key];
 if(to!==undefined&&steps[to]){
  e.preventDefault();
  var group=steps[to].closest(".group");
  if(group)group.open=true;
  steps[to].focus();
 }
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
