// Instead of the browser's own refresh: the focus is kept, and a hidden page sends no requests.
const refreshSeconds = Number(document.currentScript.dataset.refresh);
const note = document.querySelector('[role=status]');
setInterval(async () => {
  if (document.hidden || String(getSelection())) return;
  try {
    const answer = await fetch(location.href, {cache: 'no-store'});
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html').querySelector('#workers');
    if (!answer.ok || !page) throw new Error('another page');
    const focused = document.activeElement && document.activeElement.getAttribute('href');
    document.querySelector('#workers').replaceWith(document.adoptNode(page));
    const link = focused && document.querySelector(`a[href="${CSS.escape(focused)}"]`);
    if (link) link.focus({preventScroll: true});
    note.textContent = '';
  } catch {
    note.textContent = 'The page cannot be refreshed: its numbers are out of date.';
  }
}, 1000 * refreshSeconds);
