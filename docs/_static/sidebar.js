// Scrolls the sidebar to the entry of the page that is shown.
document.addEventListener("DOMContentLoaded", () => {
  const entry = document.querySelector(".sidebar-tree .current-page");
  const sidebar = document.querySelector(".sidebar-scroll");
  if (!entry || !sidebar) return;
  const [inner, outer] = [entry, sidebar].map((element) => element.getBoundingClientRect());
  if (inner.bottom > outer.bottom || inner.top < outer.top) {
    sidebar.scrollTop += inner.top - outer.top - sidebar.clientHeight / 2;
  }
});
