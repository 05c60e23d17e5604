// Frames that a notebook has stored, one at a time: buttons, a slider, arrow keys.
document.addEventListener("DOMContentLoaded", () => {
  for (const player of document.querySelectorAll(".player")) {
    const frames = [...player.querySelectorAll(".frame")];
    const step = player.dataset.step ?? "step";
    const slider = Object.assign(document.createElement("input"), {
      type: "range", min: 0, max: frames.length - 1, value: player.dataset.still,
    });
    slider.setAttribute("aria-label", step);
    const show = () => {
      const at = Number(slider.value);
      frames.forEach((frame, i) => (frame.hidden = i !== at));
      player.style.setProperty("--at", at); // a board that all frames share looks there
      slider.setAttribute("aria-valuetext", frames[at].querySelector("p").textContent);
    };
    const button = (text, label, by) => {
      const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      made.setAttribute("aria-label", label);
      made.addEventListener("click", () => {
        slider.value = Number(slider.value) + by;
        show();
      });
      return made;
    };
    slider.addEventListener("input", show);
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.append(button("◀", `one ${step} back`, -1), slider, button("▶", `one ${step} on`, 1));
    player.prepend(bar);
    show();
  }
});

// A picture that the page shows smaller than it is: a tap or Enter shows it whole, another closes it.
addEventListener("load", () => {
  const whole = document.body.appendChild(document.createElement("dialog"));
  whole.className = "whole";
  whole.addEventListener("click", () => whole.close());
  for (const picture of document.querySelectorAll(".bd-article img")) {
    const isSmall = () => picture.naturalWidth > 1.1 * picture.clientWidth;
    const show = () => {
      if (!isSmall()) return;
      const copy = Object.assign(new Image(), { src: picture.src, alt: picture.alt });
      copy.width = picture.naturalWidth;
      whole.replaceChildren(copy);
      whole.showModal();
    };
    if (!isSmall() || picture.closest("a")) continue;
    Object.assign(picture, { tabIndex: 0, title: "tap to enlarge" });
    picture.classList.add("small");
    picture.addEventListener("click", show);
    picture.addEventListener("keydown", (event) => event.key === "Enter" && show());
  }
});

// On paper nothing is folded.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
