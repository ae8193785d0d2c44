// The explorer: two cells of the bank against each other, drawn by uPlot. Form controls choose, the status line tells.
(() => {
  const box = document.getElementById('explorer');
  if (!box) return;
  const { cells, grid, presets } = JSON.parse(document.getElementById('explorer-data').textContent);
  const [LOSS, ACCURACY] = [0, 2]; // where a cell has a curve's means; its standard deviations come right after
  const gamma = box.querySelector('#explorer-gamma'), rate = box.querySelector('#explorer-rate');
  const adam = box.querySelector('#explorer-adam'), status = box.querySelector('[role=status]');
  const epochs = Object.values(cells)[0][LOSS].map((_, k) => k + 1);

  const all = (curve) => Object.values(cells).flatMap((cell) => cell[curve]).filter((value) => value > 0);
  const ends = Object.fromEntries([LOSS, ACCURACY].map((k) => [k, [Math.min(...all(k)), Math.max(...all(k))]])); // fixed axes
  const placed = () => box.querySelector('[name=placement]:checked').value;
  const values = (slider) => grid[placed()][slider.dataset.of];
  const value = (slider) => values(slider)[slider.value];
  const cell = (placement, g, lr) => cells[`${g === '0' ? 'before' : placement} ${g} ${lr}`]; // γ = 0 has no placement

  function chosen() {
    const placement = placed(), lr = value(rate), adamRate = adam.value || lr;
    return {
      sgsc: { curves: cell(placement, value(gamma), lr), name: `SGSC (${placement} Adam, γ = ${value(gamma)}, learning rate ${lr})` },
      adam: { curves: cell('before', '0', adamRate), name: `Adam (learning rate ${adamRate})` },
    };
  }

  function tell(epoch) {
    const end = ({ curves, name }) => `${name}: training loss ${curves[LOSS][epoch - 1]?.toPrecision(2) ?? 'diverged'}, `
      + `test accuracy ${(100 * curves[ACCURACY][epoch - 1]).toFixed(1)} %`;
    const { sgsc, adam } = chosen();
    status.textContent = `After ${epoch} epochs, ${end(sgsc)}. ${end(adam)}.`;
  }

  // Mean, upper and lower edge of the band for either arm. On the log scale an edge below the axis stays on it.
  const data = (curve) => [epochs, ...Object.values(chosen()).flatMap(({ curves }) => {
    const edge = (side) => curves[curve].map((mean, k) => mean === null ? null
      : Math.max(mean + side * curves[curve + 1][k], ends[curve][0]));
    return [curves[curve], edge(1), edge(-1)];
  })];

  const colour = (selector) => () => getComputedStyle(box.querySelector(selector)).color; // follows the theme
  const faint = (selector) => () => colour(selector)().replace('rgb(', 'rgba(').replace(')', ', 0.18)');
  const axis = { stroke: colour('.legend'), grid: { stroke: faint('.legend'), width: 1 }, ticks: { stroke: faint('.legend'), width: 1 },
                 font: '12px sans-serif', labelFont: '12px sans-serif', labelSize: 18 };
  const arm = (selector, dash) => [{ stroke: colour(selector), width: 2, dash, points: { show: false } },
                                   ...[1, -1].map(() => ({ points: { show: false } }))];
  const decades = (_, splits) => splits.map((y) => (Number.isInteger(Math.log10(y)) ? y : null));
  const draw = (curve, label, target) => new uPlot({
    width: 300, height: 260, legend: { show: false }, cursor: { drag: { x: false, y: false }, y: false, sync: { key: 'explorer' } },
    scales: { x: { time: false }, y: { range: ends[curve], distr: curve === LOSS ? 3 : 1 } },
    axes: [{ ...axis, label: 'epoch', size: 34 }, { ...axis, label, size: 52, ...(curve === LOSS && { grid: { ...axis.grid, filter: decades }, ticks: { show: false } }) }],
    series: [{}, ...arm('.sgsc'), ...arm('.adam', [6, 4])],
    bands: [{ series: [2, 3], fill: faint('.sgsc') }, { series: [5, 6], fill: faint('.adam') }],
    hooks: { setCursor: [(plot) => { if (plot.cursor.event) tell(epochs[plot.cursor.idx ?? epochs.length - 1]); }] },
  }, data(curve), target);

  if (presets.length) load(presets[0]); else place();
  box.querySelector('.tool').hidden = false;
  const targets = [...box.querySelectorAll('.plots > div')];
  const plots = [draw(LOSS, 'training loss (nats, log scale)', targets[0]), draw(ACCURACY, 'test accuracy', targets[1])];
  const fit = new ResizeObserver(() => plots.forEach((plot, k) => {
    if (targets[k].clientWidth) plot.setSize({ width: targets[k].clientWidth, height: 260 });
  }));
  targets.forEach((target) => fit.observe(target));

  function update() {
    for (const slider of [gamma, rate]) {
      slider.setAttribute('aria-valuetext', value(slider));
      slider.parentElement.querySelector('.value').textContent = value(slider);
    }
    plots.forEach((plot, k) => plot.setData(data([LOSS, ACCURACY][k])));
    tell(epochs.length);
  }
  function place() { // each placement has a grid of its own: the largest γ, a middle learning rate
    for (const [slider, where] of [[gamma, 1], [rate, 0.5]]) {
      slider.max = values(slider).length - 1;
      slider.value = Math.floor(slider.max * where);
    }
  }
  function load(preset) {
    box.querySelector(`[name=placement][value=${preset.placement}]`).checked = true;
    for (const [slider, name] of [[gamma, 'gamma'], [rate, 'rate']]) {
      slider.max = values(slider).length - 1;
      slider.value = values(slider).indexOf(preset[name]);
    }
    adam.value = preset.adam;
    box.querySelector('.look').textContent = preset.look;
  }
  box.querySelectorAll('.presets button').forEach((button, k) => button.addEventListener('click', () => {
    load(presets[k]);
    update();
  }));
  box.addEventListener('input', (event) => {
    if (event.target.name === 'placement') place();
    update();
  });
  update();

  const recolour = () => plots.forEach((plot) => plot.redraw());
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', recolour);
  document.querySelectorAll('[name=theme]').forEach((radio) => radio.addEventListener('change', recolour));
})();
