"use strict";
const form = document.querySelector(".search");
const problems = [...document.querySelectorAll(".problem")];
const count = form.querySelector("output");
form.hidden = false;
form.addEventListener("submit", (event) => event.preventDefault());
form.elements.find.addEventListener("input", () => {
  const wanted = form.elements.find.value.toLowerCase();
  for (const problem of problems) problem.hidden = !problem.textContent.toLowerCase().includes(wanted);
  const left = problems.filter((problem) => !problem.hidden).length;
  count.textContent = wanted ? `${left} of ${problems.length}` : "";
});
form.elements.open.addEventListener("click", () => {
  const open = problems.some((problem) => !problem.hidden && !problem.open);
  for (const problem of problems) if (!problem.hidden) problem.open = open;
  form.elements.open.textContent = open ? "Close all" : "Open all";
});
document.documentElement.dataset.script = "on";
