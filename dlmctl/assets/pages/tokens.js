"use strict";
// The page is whole without this: it only hides what is there.
const search = document.getElementById("search");
const least = document.getElementById("least");
const most = document.getElementById("most");
const count = document.getElementById("count");
const groups = [...document.getElementById("cards").children];
const cards = [...document.querySelectorAll("article")];
const entries = [...document.getElementById("index").children].map((row, place) => {
  return { row, card: cards[place], text: null };
});

function rewarded(row) {
  if (least.value === "" && most.value === "") return true;
  if (row.dataset.reward === "") return false;
  const reward = Number(row.dataset.reward);
  return (least.value === "" || reward >= Number(least.value))
    && (most.value === "" || reward <= Number(most.value));
}

function filter() {
  const wanted = search.value.toLowerCase();
  let left = 0;
  for (const entry of entries) {
    // With its prompt, which stands beside it.
    entry.text ??= [entry.card, ...entry.card.parentElement.querySelectorAll(".prompt")]
      .map((part) => part.textContent).join("\n").toLowerCase();
    const found = rewarded(entry.row) && entry.text.includes(wanted);
    entry.row.hidden = entry.card.hidden = !found;
    left += found;
  }
  for (const group of groups) {
    group.hidden = group.querySelector("article:not([hidden])") === null;
  }
  count.textContent = left;
}

for (const control of [search, least, most]) control.addEventListener("input", filter);
