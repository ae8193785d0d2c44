// Comfort only: without this script the page reads the same. Theme kept between visits, the contents follow the reader,
// what scrolls sideways can be scrolled by keyboard, and every table can be saved as CSV.
(() => {
  const root = document.documentElement;
  const store = { get() { try { return localStorage.getItem('theme'); } catch { return null; } },
                  set(theme) { try { localStorage.setItem('theme', theme); } catch { /* a file opened without storage */ } } };
  const theme = store.get() || 'auto';
  root.dataset.theme = theme;

  addEventListener('DOMContentLoaded', () => {
    for (const radio of document.querySelectorAll('input[name=theme]')) {
      radio.checked = radio.value === theme;
      radio.addEventListener('change', () => { root.dataset.theme = radio.value; store.set(radio.value); });
    }

    const nav = document.querySelector('nav'), box = nav.querySelector('details'), here = nav.querySelector('.here');
    const wide = matchMedia('(min-width: 70rem)');
    const fit = () => { box.open = wide.matches; };
    wide.addEventListener('change', fit);
    fit();
    nav.addEventListener('click', (event) => { if (event.target.closest('a') && !wide.matches) box.open = false; });

    const links = [...nav.querySelectorAll('a')];
    const targets = links.map((link) => document.getElementById(link.hash.slice(1)));
    let current = null;
    const follow = () => {
      const end = scrollY + innerHeight >= root.scrollHeight - 2;
      const line = innerHeight * (end ? 1 : 0.3);
      const k = targets.findLastIndex((target) => target.getBoundingClientRect().top <= line);
      const link = links[k] || null;
      if (link === current) return;
      current?.removeAttribute('aria-current');
      nav.querySelector('.open')?.classList.remove('open');
      current = link;
      here.textContent = link ? link.closest('nav > details > ol > li').querySelector('a').textContent : '';
      if (!link) return;
      link.setAttribute('aria-current', 'true');
      link.closest('nav > details > ol > li').classList.add('open');
      if (wide.matches) nav.scrollTop = link.offsetTop - nav.clientHeight / 2;
    };
    let waiting = false;
    addEventListener('scroll', () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; follow(); });
    }, { passive: true });
    follow();

    const quoted = (cell) => `"${cell.textContent.trim().replaceAll('"', '""')}"`;
    document.querySelectorAll(':is(#findings, .cell) .scroll > table').forEach((table, k) => {
      const csv = [...table.rows].map((row) => [...row.cells].map(quoted).join(',')).join('\r\n');
      const link = Object.assign(document.createElement('a'), {
        download: `${table.closest('figure')?.id ?? `table-${k + 1}`}.csv`, textContent: 'Save this table as CSV',
        href: `data:text/csv;charset=utf-8,${encodeURIComponent(`${csv}\r\n`)}`,
      });
      link.setAttribute('aria-label', `Save as CSV: ${link.download}`);
      const tools = Object.assign(document.createElement('p'), { className: 'tools' });
      tools.append(link);
      table.parentElement.after(tools);
    });

    const reach = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        if (target.scrollWidth > target.clientWidth) target.tabIndex = 0; else target.removeAttribute('tabindex');
      }
    });
    for (const area of document.querySelectorAll('.scroll, .plate, pre, .equation')) reach.observe(area);
  });
})();
