"use strict";
const form = document.querySelector(".search");
const controls = form.elements;
const problems = [...document.querySelectorAll(".problem")];
const count = form.querySelector("output");
const texts = new Map();
const textOf = (problem) => {
  if (!texts.has(problem)) texts.set(problem, problem.textContent.toLowerCase());
  return texts.get(problem);
};
const filter = () => {
  const wanted = controls.find.value.trim().toLowerCase();
  const matches = (problem) =>
    (!controls.stop.value || problem.dataset.stop === controls.stop.value) &&
    (!controls.noted.checked || "noted" in problem.dataset) &&
    (!wanted || textOf(problem).includes(wanted));
  for (const problem of problems) problem.hidden = !matches(problem);
  const left = problems.filter((problem) => !problem.hidden).length;
  count.textContent = left < problems.length ? `${left} of ${problems.length}` : "";
};
// A link to a problem or a call opens all that it is folded in.
const reveal = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
};
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", filter);
controls.open.addEventListener("click", () => {
  const open = problems.some((problem) => !problem.hidden && !problem.open);
  for (const problem of problems) if (!problem.hidden) problem.open = open;
  controls.open.textContent = open ? "Close all" : "Open all";
});
addEventListener("hashchange", reveal);
form.hidden = false;
reveal();
document.documentElement.dataset.script = "on";
