// Tables are sorted by a click on a column's head: numbers as numbers, the rest as text.
document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const head = button.closest('th'), table = head.closest('table'), body = table.tBodies[0];
  const column = head.cellIndex, down = head.getAttribute('aria-sort') === 'ascending';
  const key = row => { const cell = row.cells[column]; return cell.dataset.value ?? cell.textContent; };
  const compare = (a, b) => {
    const x = Number(key(a)), y = Number(key(b));
    return Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
  };
  const rows = [...body.rows].sort((a, b) => down ? compare(b, a) : compare(a, b));
  table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  body.append(...rows);
}));
