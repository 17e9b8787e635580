// Scan orders over a picture, and the classifier of digits in WebAssembly. `make web-demo` writes demo.json, model.onnx,
// examples/ and ort/ beside this file.

const LARGEST_K = 256;
const WORDS = {h: 'rows', v: 'columns', 'w<K>': 'windows', diag: 'diagonals', zigzag: 'rows, to and fro',
  hilbert: 'Hilbert curve'};

/**
 * The steps of a scan, {row, col, token} each; token is -1 for a pad. mmlocalmamba.directions defines them, a test compares.
 * tables: {'8x8': {name: [tokens]}}, of the directions that are neither rows, columns nor windows.
 */
export function scanSteps(name, height, width, tables = {}) {
  const flip = name.endsWith('_flip');
  const base = flip ? name.slice(0, -5) : name;
  const at = (row, col) => ({row, col, token: row < height && col < width ? row * width + col : -1});
  const lines = (rows, cols) => range(rows).flatMap(row => range(cols).map(col => [row, col]));
  const K = /^w\d{1,9}$/.test(base) ? Number(base.slice(1)) : 0;
  const table = tables[`${height}x${width}`]?.[base];
  let steps;
  if (base === 'h') {
    steps = lines(height, width).map(([row, col]) => at(row, col));
  } else if (base === 'v') {
    steps = lines(width, height).map(([col, row]) => at(row, col));
  } else if (K >= 1 && K <= LARGEST_K) {
    steps = lines(Math.ceil(height / K), Math.ceil(width / K)).flatMap(
      ([top, left]) => lines(K, K).map(([row, col]) => at(top * K + row, left * K + col)));
  } else if (table) {
    steps = table.map(token => at(Math.floor(token / width), token % width));
  } else {
    throw new RangeError(`no scan ${name} of ${height}x${width} tokens`);
  }
  return flip ? steps.reverse() : steps;
}

function range(count) {
  return [...Array(count).keys()];
}

/** Normalised (1, 3, H, W), as metadata say, of RGBA pixels. */
export function normalise(pixels, {width, height, mean, std, channels}) {
  const count = width * height;
  const values = new Float32Array(3 * count);
  for (let channel = 0; channel < 3; channel++) {
    const source = channels === 'RGB' ? channel : 2 - channel;
    for (let i = 0; i < count; i++) {
      values[channel * count + i] = (pixels[4 * i + source] - mean[channel]) / std[channel];
    }
  }
  return values;
}

export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, value => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(value => value / sum);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

// ---- pictures: functions that draw themselves into a square of a canvas ----

// Of the training's 32 pixels: how wide a stroke is, and the box around the strokes' middles.
const STROKE = 4 / 32, BOX = {width: 14 / 32, height: 17.5 / 32};

function drawLines(context, strokes, width, place) {
  context.lineCap = context.lineJoin = 'round';
  context.lineWidth = width;
  context.strokeStyle = '#fff';
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...place(stroke[0]));
    for (const point of stroke) {
      context.lineTo(...place(point));
    }
    context.stroke();
  }
}

/** Strokes of points [x, y] from 0 to 1: as high and as wide as training digits are, and in the middle. */
function ofStrokes(strokes) {
  return (context, size) => {
    const [xs, ys] = [0, 1].map(axis => strokes.flat().map(point => point[axis]));
    const ends = values => [Math.min(...values), Math.max(...values)];
    const [[left, right], [top, bottom]] = [ends(xs), ends(ys)];
    // Not more than a dot is left a dot.
    const scale = Math.min(BOX.height / Math.max(bottom - top, 0.2), BOX.width / Math.max(right - left, 0.2));
    const middle = [(left + right) / 2, (top + bottom) / 2];
    drawLines(context, strokes, STROKE * size, point => point.map(
      (value, axis) => size * (0.5 + scale * (value - middle[axis]))));
  };
}

/** The largest square in the middle. */
function ofBitmap(bitmap) {
  return (context, size) => {
    const side = Math.min(bitmap.width, bitmap.height);
    context.imageSmoothingEnabled = side > size;
    context.imageSmoothingQuality = 'high';
    context.drawImage(bitmap, (bitmap.width - side) >> 1, (bitmap.height - side) >> 1, side, side, 0, 0, size, size);
  };
}

function paint(context, size, picture, invert) {
  context.globalCompositeOperation = 'source-over';
  context.fillStyle = '#000';
  context.fillRect(0, 0, size, size);
  picture?.(context, size);
  if (invert) {
    context.globalCompositeOperation = 'difference';
    context.fillStyle = '#fff';
    context.fillRect(0, 0, size, size);
    context.globalCompositeOperation = 'source-over';
  }
}

// ---- the page ----

const $ = id => document.getElementById(id);

function say(text, isError = false) {
  $('message').textContent = text;
  $('message').classList.toggle('error', isError);
}

/** The scan's order over the picture, as a function of the picture; controls do the rest. */
function scanView(demo) {
  const canvas = $('view'), context = canvas.getContext('2d');
  const backdrop = document.createElement('canvas');
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  let picture = null, invert = false, name, grid, steps, playing = !still, last = 0, due = 0;

  function choose() {
    const windows = $('direction').value === 'w<K>';
    $('size-label').hidden = !windows;
    if (windows && !$('size').checkValidity()) {
      say(`K is a whole number from 1 to ${$('size').max}.`, true);
      return;
    }
    grid = demo.grids[$('grid').value];
    name = (windows ? `w${Number($('size').value)}` : $('direction').value) + ($('flip').checked ? '_flip' : '');
    steps = scanSteps(name, grid.height, grid.width, demo.tables);
    $('step').max = steps.length;
    $('step').value = playing ? 1 : Math.min(Number($('step').value), steps.length);
    const pads = steps.filter(step => step.token < 0).length;
    canvas.setAttribute('aria-label', `Scan ${name} over ${grid.height}x${grid.width} tokens: ${steps.length} steps, ` +
      `${pads} of them pads`);
    draw();
  }

  function draw() {
    const rows = Math.max(...steps.map(step => step.row)) + 1, cols = Math.max(...steps.map(step => step.col)) + 1;
    const cell = canvas.width / Math.max(rows, cols), now = Number($('step').value) - 1;
    const center = step => [(step.col + 0.5) * cell, (step.row + 0.5) * cell];
    context.fillStyle = '#000';
    context.fillRect(0, 0, canvas.width, canvas.height);
    backdrop.width = backdrop.height = Math.ceil(cell * Math.max(grid.height, grid.width));
    paint(backdrop.getContext('2d'), backdrop.width, picture, invert);
    context.drawImage(backdrop, 0, 0, grid.width * cell, grid.height * cell);
    for (const step of steps) {
      const [x, y] = [step.col * cell, step.row * cell];
      if (step.token < 0) {
        context.fillStyle = '#5a4a6e';
        context.fillRect(x, y, cell, cell);
        strokePath([[x, y + cell], [x + cell, y]], '#a58fc4', 1);
      }
      context.strokeStyle = 'rgb(150 160 170 / 60%)';
      context.lineWidth = 1;
      context.strokeRect(x, y, cell, cell);
    }
    const K = Number(/^w(\d+)/.exec(name)?.[1] ?? 0);
    for (let edge = K; K && edge < Math.max(rows, cols); edge += K) {
      strokePath([[edge * cell, 0], [edge * cell, rows * cell]], '#fff', 3);
      strokePath([[0, edge * cell], [cols * cell, edge * cell]], '#fff', 3);
    }
    for (let t = 1; t <= now; t++) {
      const line = [center(steps[t - 1]), center(steps[t])];
      strokePath(line, '#000', Math.max(3, cell / 7) + 2);
      strokePath(line, `hsl(${200 - 155 * t / steps.length} 95% 60%)`, Math.max(2, cell / 7));
    }
    const [x, y] = center(steps[now]);
    context.fillStyle = '#ff2d95';
    context.strokeStyle = '#fff';
    context.lineWidth = 2;
    context.beginPath();
    context.arc(x, y, Math.max(4, cell * 0.3), 0, 2 * Math.PI);
    context.fill();
    context.stroke();
    const {row, col, token} = steps[now];
    $('where').textContent = `${name}, step ${now + 1} of ${steps.length}: ` +
      (token < 0 ? 'a pad that completes a window' : `token ${token} (row ${row + 1}, column ${col + 1})`);
  }

  function strokePath(points, color, width) {
    context.strokeStyle = color;
    context.lineWidth = width;
    context.beginPath();
    points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.stroke();
  }

  function tick(time) {
    if (playing) {
      due += Math.min(time - last, 100) / 1000 * Number($('speed').value);
      if (due >= 1) {
        const now = Number($('step').value) + Math.floor(due);
        due %= 1;
        $('step').value = now > steps.length ? 1 : now;
        draw();
      }
    }
    last = time;
    requestAnimationFrame(tick);
  }

  function play(on) {
    playing = on;
    $('play').textContent = on ? 'Pause' : 'Play';
  }

  const options = (select, texts, values) => texts.forEach((text, i) => select.add(new Option(text, values[i])));
  const names = ['h', 'v', 'w<K>', ...Object.keys(Object.values(demo.tables)[0])];
  options($('direction'), names.map(known => (WORDS[known] ? `${known}: ${WORDS[known]}` : known)), names);
  options($('grid'), demo.grids.map(known => known.label), range(demo.grids.length));
  $('direction').value = 'w<K>';
  for (const id of ['direction', 'size', 'flip', 'grid']) {
    $(id).addEventListener('change', () => { say(''); choose(); });
  }
  $('step').addEventListener('input', () => { play(false); draw(); });
  $('play').addEventListener('click', () => play(!playing));
  play(playing);
  choose();
  requestAnimationFrame(tick);
  return (newPicture, newInvert) => {
    picture = newPicture;
    invert = newInvert;
    draw();
  };
}

/** The model, as a function of normalised values, or of null for no picture; the latest wins. */
async function classifier(demo) {
  const ort = await import('./ort/ort.js');
  ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
  ort.env.wasm.wasmPaths = {wasm: new URL('./ort/ort-wasm-simd-threaded.wasm', import.meta.url).href};
  const session = await ort.InferenceSession.create(new URL('./model.onnx', import.meta.url).href);
  const shape = [1, 3, demo.model.height, demo.model.width];
  const times = [];
  let latest = null, waiting = null, running = false;

  async function run(values) {
    const images = new ort.Tensor('float32', values, shape);
    const start = performance.now();
    const outputs = await session.run({[demo.model.input]: images});
    return {logits: outputs[demo.model.outputs[0]].data, time: performance.now() - start};
  }

  function show({logits, time}) {
    const shares = softmax(logits), percent = share => `${(100 * share).toFixed(1)} %`;
    const best = range(shares.length).sort((a, b) => shares[b] - shares[a]).slice(0, 5);
    $('answer').textContent = `Looks like ${demo.model.classes[best[0]]}, ${percent(shares[best[0]])}.`;
    $('result').dataset.logits = JSON.stringify(Array.from(logits));
    $('result').replaceChildren(...best.map(index => {
      const [row, name, track, bar, number] = ['li', 'span', 'span', 'i', 'b'].map(tag => document.createElement(tag));
      name.textContent = demo.model.classes[index];
      bar.style.width = `${100 * shares[index]}%`;
      number.textContent = percent(shares[index]);
      track.append(bar);
      row.append(name, track, number);
      return row;
    }));
    times.push(time);
    const recent = times.slice(-50);
    $('time').textContent = `${time.toFixed(1)} ms for this image; median of the last ${recent.length}: ` +
      `${median(recent).toFixed(1)} ms, 1 thread.`;
  }

  async function classify(values) {
    latest = waiting = values;
    $('measure').disabled = !values;
    if (!values) {
      $('answer').textContent = $('time').textContent = '';
      $('result').replaceChildren();
      delete $('result').dataset.logits;
    }
    if (running) {
      return;
    }
    running = true;
    try {
      while (waiting) {
        const images = waiting;
        waiting = null;
        const result = await run(images);
        latest && show(result);
      }
    } catch (error) {
      say(`The model failed: ${error.message}`, true);
    } finally {
      running = false;
    }
  }

  $('measure').addEventListener('click', async () => {
    for (let i = 0; i < 50 && latest; i++) {
      await classify(latest);
    }
  });
  await run(new Float32Array(3 * demo.model.height * demo.model.width)); // the first run takes longer
  return classify;
}

/** What is drawn, opened or dropped; `changed` gets the picture. */
function pictures(demo, changed) {
  const pad = $('pad'), context = pad.getContext('2d'), size = pad.width;
  let picture = null, strokes = [], drawing = false, pen = [0.5, 0.5], hasKeys = false;

  function refresh() {
    paint(context, size, strokes.length ? null : picture, $('invert').checked);
    drawLines(context, strokes, 0.1 * size, point => point.map(value => value * size));
    if (hasKeys) {
      context.fillStyle = drawing ? '#ff2d95' : '#4cc2ff';
      context.fillRect(pen[0] * size - 5, pen[1] * size - 5, 10, 10);
    }
    changed(picture, $('invert').checked);
  }

  function use(newPicture, newStrokes) {
    strokes = newStrokes;
    picture = newPicture;
    drawing = false;
    $('invert').checked = false;
    $('invert').disabled = !picture || strokes.length > 0;
    say('');
  }

  function clear() {
    use(null, []);
    refresh();
  }

  function begin(point) {
    if (!strokes.length) {
      use(null, []);
    }
    drawing = true;
    strokes.push([point]);
    extend(point);
  }

  function extend(point) {
    strokes.at(-1).push(point);
    picture = ofStrokes(strokes);
    $('invert').disabled = true;
    refresh();
  }

  async function open(file, name = file.name) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      say(`This browser cannot read ${name || 'this'} as a picture. It reads PNG, JPEG and WebP.`, true);
      return;
    }
    use(ofBitmap(bitmap), []);
    $('invert').checked = borderIsLight(bitmap);
    refresh();
  }

  function borderIsLight(bitmap) {
    const probe = new OffscreenCanvas(8, 8).getContext('2d');
    paint(probe, 8, ofBitmap(bitmap), false);
    const {data} = probe.getImageData(0, 0, 8, 8);
    const border = range(64).filter(i => i < 8 || i >= 56 || i % 8 === 0 || i % 8 === 7);
    return median(border.map(i => data[4 * i] + data[4 * i + 1] + data[4 * i + 2])) > 3 * 127;
  }

  const place = event => {
    const box = pad.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(
      value => Math.min(Math.max(value, 0), 1));
  };
  pad.addEventListener('pointerdown', event => {
    if (event.isPrimary && event.button === 0) {
      pad.setPointerCapture(event.pointerId);
      hasKeys = false;
      begin(place(event));
    }
  });
  pad.addEventListener('pointermove', event => drawing && !hasKeys && event.isPrimary && extend(place(event)));
  pad.addEventListener('lostpointercapture', () => { drawing = false; });
  pad.addEventListener('keydown', event => {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (event.ctrlKey || event.altKey || event.metaKey || !(move || [' ', 'Backspace'].includes(event.key))) {
      return;
    }
    event.preventDefault();
    hasKeys = true;
    if (move) {
      pen = pen.map((value, axis) => Math.min(Math.max(value + move[axis] / 20, 0.05), 0.95));
      drawing ? extend(pen) : refresh();
    } else if (event.key === ' ') {
      drawing ? (drawing = false, refresh()) : begin(pen);
      say(drawing ? 'Pen down.' : 'Pen up.');
    } else if (strokes.length) {
      use(strokes.length > 1 ? ofStrokes(strokes.slice(0, -1)) : null, strokes.slice(0, -1));
      refresh();
    }
  });
  pad.addEventListener('blur', () => { drawing = hasKeys = false; refresh(); });
  $('clear').addEventListener('click', clear);
  $('invert').addEventListener('change', refresh);
  $('file').addEventListener('change', async event => {
    const [file] = event.target.files;
    event.target.value = ''; // the same file may be chosen again
    file && await open(file);
  });
  document.addEventListener('dragover', event => event.preventDefault());
  document.addEventListener('drop', async event => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    file ? await open(file) : say('That is not a file. Drop a picture from a folder.', true);
  });
  const example = async ({file, label}) => open(await (await fetch(file)).blob(), `the ${label}`);
  for (const known of demo.examples) {
    const button = document.createElement('button'), image = new Image(32, 32);
    button.type = 'button';
    image.src = known.file;
    image.alt = `a ${known.label}`;
    button.append(image);
    button.addEventListener('click', () => example(known));
    $('examples').append(button);
  }
  refresh();
  return () => (picture ? refresh() : example(demo.examples[3 % demo.examples.length]));
}

async function start() {
  const answer = await fetch('demo.json');
  if (!answer.ok) {
    throw new Error('it is not built. In a clone, run `make web-demo`');
  }
  const demo = await answer.json(), {height, width} = demo.model;
  $('input').width = width;
  $('input').height = height;
  const input = $('input').getContext('2d', {willReadFrequently: true});
  let classify = () => {};
  const view = scanView(demo);
  const changed = (picture, invert) => {
    view(picture, invert);
    paint(input, width, picture, invert);
    const pixels = () => input.getImageData(0, 0, width, height).data;
    classify(picture && normalise(pixels(), demo.model));
  };
  const showFirst = pictures(demo, changed);
  $('blocks').textContent = `The model reads every image in the directions ${demo.directions.join(', ')}, and adds ` +
    'their outputs.';
  $('name').textContent = ` (${demo.name})`;
  $('model').textContent = demo.about;
  say('Loading the model ...');
  classify = await classifier(demo);
  await showFirst();
}

if (globalThis.document) {
  start().catch(error => say(`The demo cannot start: ${error.message}.`, true));
}
