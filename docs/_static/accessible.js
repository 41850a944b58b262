// The theme leaves two things out: the level of the menu's headings, and a way to scroll by the keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const heading of document.querySelectorAll('.caption[role="heading"]')) heading.setAttribute("aria-level", "2");
  const scrolls = () => {
    for (const region of document.querySelectorAll("pre, .table-wrapper, .toc-scroll, .sidebar-scroll")) {
      if (region.scrollWidth > region.clientWidth || region.scrollHeight > region.clientHeight) region.tabIndex = 0;
    }
  };
  scrolls();
  addEventListener("resize", scrolls);
});
