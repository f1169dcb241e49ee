(() => {
  const tip = document.body.appendChild(document.createElement('div'));
  tip.className = 'tip';
  const hide = () => { tip.style.display = 'none'; };
  const show = (event, lines) => {
    tip.replaceChildren(...lines.map(text => {
      const line = document.createElement('div');
      line.textContent = text;
      return line;
    }));
    tip.style.display = 'block';
    const right = innerWidth - tip.offsetWidth - 8, below = event.clientY + 18;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, right)) + 'px';
    tip.style.top = (below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below) + 'px';
  };
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  for (const svg of document.querySelectorAll('svg[data-curves]')) {
    const curves = JSON.parse(svg.dataset.curves).filter(curve => curve[1].length);
    const cursor = svg.querySelector('.cursor');
    svg.addEventListener('pointermove', event => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const here = nearest(curves.map(curve => nearest(curve[1], x)), x);
      cursor.setAttribute('transform', `translate(${here[0]} 0)`);
      cursor.style.visibility = 'visible';
      show(event, ['step ' + here[1], ...curves.map(([label, points]) => {
        const point = nearest(points, here[0]);
        return label + ' ' + point[2] + (point[1] === here[1] ? '' : ' (at ' + point[1] + ')');
      })]);
    });
    svg.addEventListener('pointerleave', () => { cursor.style.visibility = 'hidden'; hide(); });
  }
  for (const image of document.querySelectorAll('img[data-matrix]')) {
    const [names, cells] = JSON.parse(image.dataset.matrix), size = names.length;
    image.addEventListener('pointermove', event => {
      const box = image.getBoundingClientRect();
      const at = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor(offset / length * size)));
      const row = at(event.clientY - box.top, box.height), column = at(event.clientX - box.left, box.width);
      show(event, [names[row] + ' → ' + names[column], 'count ' + (cells[row * size + column] || 0)]);
    });
    image.addEventListener('pointerleave', hide);
  }
  for (const button of document.querySelectorAll('.sortable th button')) button.addEventListener('click', () => {
    const head = button.parentElement, body = head.closest('table').tBodies[0], column = head.cellIndex;
    const numeric = [...body.rows].some(row => row.cells[column].dataset.v);
    const order = head.ariaSort ? (head.ariaSort === 'ascending' ? 'descending' : 'ascending')
      : (numeric ? 'descending' : 'ascending');
    for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => {
      const left = a.cells[column], right = b.cells[column];
      if (!numeric) return sign * left.textContent.localeCompare(right.textContent, undefined, {numeric: true});
      if (!left.dataset.v || !right.dataset.v) return !left.dataset.v - !right.dataset.v;
      return sign * (left.dataset.v - right.dataset.v);
    }));
  });
  for (const button of document.querySelectorAll('.copy')) button.addEventListener('click', async () => {
    const code = button.parentElement.querySelector('code');
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = 'Copied'; }
    catch { button.textContent = 'Selected'; }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
  addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
})();
