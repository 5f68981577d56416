"use strict";
// A notice of replaced results is shown once per browser, and once in each tab that was open before.
(() => {
  const read = (store, key) => JSON.parse(store.getItem(key) || "[]");
  const opened = Number(sessionStorage.getItem("crossdiff-opened") || Date.now());
  sessionStorage.setItem("crossdiff-opened", opened);
  for (const notice of document.querySelectorAll("[data-notice]")) {
    const key = notice.dataset.notice, wasOpen = opened < Number(notice.dataset.time);
    const isKnown = read(wasOpen ? sessionStorage : localStorage, "crossdiff-told").includes(key);
    notice.hidden = isKnown;
    notice.querySelector("button").onclick = () => notice.remove();
    if (isKnown) continue;
    for (const store of [sessionStorage, localStorage]) {
      store.setItem("crossdiff-told", JSON.stringify([...read(store, "crossdiff-told"), key].slice(-50)));
    }
  }
})();
