// Runs before the page is drawn, so that it never shows in the wrong colors.
{
  const chosen = (() => {
    try {
      return localStorage.getItem("calotype-theme");
    } catch {
      return null;
    }
  })();
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
