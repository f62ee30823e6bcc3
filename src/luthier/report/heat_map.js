"use strict";
const text = document.querySelector(".heat");
const tip = document.querySelector(".tip");
const told = new Map();
let current = null;
// The browser's own tooltips come late and in one style: the titles become ours.
for (const token of text.children) {
  told.set(token, token.title);
  token.removeAttribute("title");
}
const line = (tag, words, name) => {
  const part = document.createElement(tag);
  part.textContent = words + "\n";
  if (name) part.className = name;
  return part;
};
const hide = () => {
  if (current) current.classList.remove("on");
  current = null;
  tip.hidden = true;
};
const show = (token) => {
  hide();
  current = token;
  token.classList.add("on");
  const [own, ...others] = told.get(token).split("\n");
  tip.replaceChildren(
    line("strong", own),
    ...others.map((words) => line("span", words, words.endsWith(" % " + own) ? "mark" : "")),
  );
  tip.hidden = false;
  const box = token.getClientRects()[0] || token.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 10 < innerHeight || box.top < tip.offsetHeight + 10;
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + scrollY}px`;
};
const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".heat > span") : null);
text.addEventListener("pointerover", (event) => {
  const token = tokenOf(event);
  if (token && token !== current) show(token);
});
text.addEventListener("pointerleave", hide);
text.addEventListener("blur", hide);
text.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return hide();
  const steps = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = current ? current[steps[event.key]] : text.firstElementChild;
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  show(next);
});
document.documentElement.dataset.script = "on";
