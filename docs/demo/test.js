// The built page in a headless Chromium, as a user would use it: `node test.js GIVEN`, which docs/demo/web_demo.py calls.
// GIVEN is a JSON file with the page's address, and with what Python has computed.
import assert from 'node:assert/strict';
import {mkdirSync, readFileSync} from 'node:fs';
import {join} from 'node:path';

import axe from 'axe-core';
import {chromium} from 'playwright-core';

const given = JSON.parse(readFileSync(process.argv[2]));
const TOLERANCE = 1e-3;

const browser = await chromium.launch({
  executablePath: given.chromium,
  args: process.getuid?.() === 0 ? ['--no-sandbox'] : [], // its sandbox does not work for root
});
// A page that hangs cannot be closed.
setTimeout(() => {
  console.log('FAILED  the checks did not end within 20 minutes');
  process.exit(1);
}, 20 * 60 * 1000).unref();
mkdirSync(given.screenshots, {recursive: true});

/** A page, and what went wrong in it. */
async function open({context = {}, prepare, ready = true} = {}) {
  const tab = await (await browser.newContext({viewport: {width: 1280, height: 900}, ...context})).newPage();
  const wrong = [];
  tab.on('console', message => {
    if (['error', 'warning'].includes(message.type())) {
      wrong.push(`console: ${message.text()}`);
    }
  });
  tab.on('pageerror', error => wrong.push(`exception: ${error}`));
  tab.on('requestfailed', request => wrong.push(`failed: ${request.url()}`));
  tab.on('response', response => response.status() >= 400 && wrong.push(`${response.status()}: ${response.url()}`));
  tab.on('request', request => {
    if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(given.url)) {
      wrong.push(`elsewhere: ${request.url()}`);
    }
  });
  tab.setDefaultTimeout(60000);
  await prepare?.(tab);
  await tab.goto(given.url);
  if (ready) {
    await logits(tab);
  }
  return {tab, wrong};
}

async function logits(tab) {
  const text = await tab.waitForFunction(() => document.getElementById('result').dataset.logits);
  return JSON.parse(await text.jsonValue());
}

/** Of what the action brings, not of what was there before. */
async function logitsAfter(tab, action) {
  await tab.click('#clear');
  await tab.waitForFunction(() => !document.getElementById('result').dataset.logits);
  await action();
  return logits(tab);
}

const best = values => given.classes[values.indexOf(Math.max(...values))];
const difference = (a, b) => Math.max(...a.map((value, index) => Math.abs(value - b[index])));

async function says(tab, pattern) {
  await tab.waitForFunction(source => RegExp(source).test(document.getElementById('message').textContent),
    pattern.source);
}

async function drop(tab, {name, type, text}) {
  await tab.evaluate(({name, type, text}) => {
    const dataTransfer = new DataTransfer();
    name ? dataTransfer.items.add(new File([text], name, {type})) : dataTransfer.setData('text/plain', text);
    const options = {dataTransfer, bubbles: true, cancelable: true};
    document.getElementById('view').dispatchEvent(new DragEvent('drop', options));
  }, {name, type, text});
}

async function draw(tab, strokes) {
  const box = await tab.locator('#pad').boundingBox();
  for (const stroke of strokes) {
    const points = stroke.map(([x, y]) => [box.x + x * box.width, box.y + y * box.height]);
    await tab.mouse.move(...points[0]);
    await tab.mouse.down();
    for (const point of points) {
      await tab.mouse.move(...point, {steps: 4});
    }
    await tab.mouse.up();
  }
}

const arc = (x, y, width, height, from, to) => [...Array(25).keys()].map(i => {
  const angle = (from + (to - from) * i / 24) * Math.PI / 180;
  return [x + width * Math.cos(angle), y + height * Math.sin(angle)];
});
const DRAWN = {
  0: [arc(0.5, 0.5, 0.22, 0.32, -90, 270)],
  2: [[...arc(0.5, 0.35, 0.18, 0.17, -170, 40), [0.32, 0.82], [0.7, 0.82]]],
  3: [[...arc(0.48, 0.34, 0.17, 0.16, -150, 90), ...arc(0.48, 0.66, 0.19, 0.16, -90, 150)]],
  6: [[[0.58, 0.14], [0.42, 0.35], [0.34, 0.6], ...arc(0.5, 0.68, 0.16, 0.14, 180, 540)]],
};

const checks = {
  async 'validation digits get the logits that onnxruntime gives in Python'() {
    const {tab, wrong} = await open();
    let worst = 0;
    for (const {file, logits: expected} of given.images) {
      const found = await logitsAfter(tab, () => tab.setInputFiles('#file', file));
      worst = Math.max(worst, difference(found, expected));
      assert.ok(worst <= TOLERANCE, `${file}: ${worst}`);
      assert.equal(best(found), best(expected));
      assert.match(await tab.textContent('#answer'), RegExp(`^Looks like ${best(expected)}, `));
      assert.equal(await tab.locator('#result li span').first().textContent(), best(expected));
    }
    assert.deepEqual(wrong, []);
    assert.equal(await tab.textContent('#name'), ` (${given.name})`);
    return `${given.images.length} images, largest difference ${worst.toExponential(1)}`;
  },

  async 'digits that are drawn are read, wherever and however large'() {
    const {tab, wrong} = await open();
    for (const [digit, strokes] of Object.entries(DRAWN)) {
      const small = strokes.map(stroke => stroke.map(([x, y]) => [0.05 + x * 0.5, 0.4 + y * 0.5]));
      for (const variant of [strokes, small]) {
        assert.equal(best(await logitsAfter(tab, () => draw(tab, variant))), digit);
      }
    }
    await tab.screenshot({path: join(given.screenshots, 'drawn.png'), fullPage: true});
    await tab.click('#clear');
    assert.equal(await tab.textContent('#answer'), '');
    assert.deepEqual(wrong, []);
  },

  async 'each step is shown where the table of Python has it'() {
    const {tab, wrong} = await open();
    await tab.click('#play');
    for (const {name, grid, height, width, table} of given.scans) {
      const base = name.replace('_flip', ''), K = Number(/^w(\d+)$/.exec(base)?.[1] ?? 0);
      await tab.selectOption('#grid', String(grid));
      await tab.selectOption('#direction', K ? 'w<K>' : base);
      if (K) {
        await tab.fill('#size', String(K));
        await tab.press('#size', 'Tab');
      }
      await tab.setChecked('#flip', name.endsWith('_flip'));
      assert.equal(Number(await tab.getAttribute('#step', 'max')), table.length, name);
      const across = K ? K * Math.ceil(Math.max(height, width) / K) : Math.max(height, width);
      for (const t of new Set([0, 1, (table.length / 3) | 0, (table.length / 2) | 0, table.length - 1])) {
        await tab.fill('#step', String(t + 1));
        const text = await tab.textContent('#where'), token = table[t];
        assert.ok(text.startsWith(`${name}, step ${t + 1} of ${table.length}: `), text);
        const marked = await tab.evaluate(across => {
          const view = document.getElementById('view'), {width, height} = view, cell = width / across;
          const context = new OffscreenCanvas(width, height).getContext('2d', {willReadFrequently: true});
          context.drawImage(view, 0, 0);
          const color = (row, col, offset) => Array.from(context.getImageData(
            Math.floor((col + offset) * cell), Math.floor((row + offset) * cell), 1, 1).data.slice(0, 3)).join();
          const cells = [...Array(across * across).keys()].map(i => [Math.floor(i / across), i % across]);
          return cells.filter(([row, col]) => color(row, col, 0.5) === '255,45,149');
        }, across);
        assert.equal(marked.length, 1, `${text}: marked are ${marked.join(' ')}`);
        const [row, col] = marked[0];
        if (token < 0) {
          assert.match(text, /a pad/);
          assert.ok(row >= height || col >= width, text);
        } else {
          assert.match(text, RegExp(`token ${token} `));
          assert.deepEqual([row, col], [Math.floor(token / width), token % width], text);
        }
      }
    }
    assert.deepEqual(wrong, []);
    return `${given.scans.length} scans`;
  },

  async 'the order moves, stops, and does not move for who has asked for no motion'() {
    const {tab} = await open();
    const step = () => tab.inputValue('#step');
    const before = await step();
    await tab.waitForFunction(before => document.getElementById('step').value !== before, before);
    await tab.click('#play');
    const stopped = await step();
    await tab.waitForTimeout(500);
    assert.equal(await step(), stopped);
    const {tab: still} = await open({context: {reducedMotion: 'reduce'}});
    await still.waitForTimeout(500);
    assert.equal(await still.inputValue('#step'), '1');
    assert.equal(await still.textContent('#play'), 'Play');
  },

  async 'the keyboard is enough'() {
    const {tab, wrong} = await open({context: {reducedMotion: 'reduce'}});
    const focused = () => tab.evaluate(() => document.activeElement.id || document.activeElement.firstChild?.alt);
    const order = [];
    for (await tab.keyboard.press('Tab'); await focused() && order.length < 40; await tab.keyboard.press('Tab')) {
      order.push(await focused());
      const width = await tab.evaluate(() => {
        const shown = document.activeElement.closest('.button') ?? document.activeElement;
        return parseFloat(getComputedStyle(shown).outlineWidth);
      });
      assert.ok(width >= 2, `${order.at(-1)} does not show its focus`);
      if (order.at(-1) === 'measure') {
        break;
      }
    }
    const examples = given.classes.map(label => `a validation digit ${label}`);
    assert.deepEqual(order, ['pad', 'clear', 'file', 'invert', ...examples,
      'play', 'step', 'direction', 'size', 'flip', 'grid', 'speed', 'measure']);
    // An example.
    while (await focused() !== 'a validation digit 7') {
      await tab.keyboard.press('Shift+Tab');
    }
    await tab.keyboard.press('Enter');
    await tab.waitForFunction(() => /^Looks like 7/.test(document.getElementById('answer').textContent));
    // A direction, its flip, and steps.
    while (await focused() !== 'direction') {
      await tab.keyboard.press('Tab');
    }
    await tab.keyboard.type('v');
    await tab.keyboard.press('Tab');
    await tab.keyboard.press('Space');
    while (await focused() !== 'step') {
      await tab.keyboard.press('Shift+Tab');
    }
    await tab.keyboard.press('Home');
    await tab.keyboard.press('ArrowRight');
    assert.match(await tab.textContent('#where'), /^v_flip, step 2 of 64: token 55 /);
    // Canvases say what they are.
    for (const [role, name] of [['img', 'Scan v_flip over 8x8 tokens: 64 steps, 0 of them pads'],
      ['application', 'Draw a digit'], ['img', 'Input of the model']]) {
      assert.equal(await tab.getByRole(role, {name, exact: true}).count(), 1, name);
    }
    // A digit, of straight lines, and one more line that is taken back.
    while (await focused() !== 'pad') {
      await tab.keyboard.press('Shift+Tab');
    }
    const press = async (key, times) => {
      for (let i = 0; i < times; i++) {
        await tab.keyboard.press(key);
      }
    };
    await press('ArrowUp', 6);
    await press('ArrowLeft', 3);
    await tab.keyboard.press('Space');
    await says(tab, /^Pen down/);
    for (const [key, times] of [['ArrowRight', 7], ['ArrowDown', 12], ['ArrowLeft', 7], ['ArrowUp', 12]]) {
      await press(key, times);
    }
    await tab.keyboard.press('Space');
    await says(tab, /^Pen up/);
    await tab.waitForFunction(() => /^Looks like 0/.test(document.getElementById('answer').textContent));
    const zero = await logits(tab);
    await tab.screenshot({path: join(given.screenshots, 'keyboard.png'), fullPage: true});
    await press('ArrowRight', 9);
    await tab.keyboard.press('Space');
    await press('ArrowDown', 2);
    await tab.keyboard.press('Space');
    await tab.keyboard.press('Backspace');
    await tab.waitForFunction(expected => document.getElementById('result').dataset.logits === expected,
      JSON.stringify(zero));
    await tab.keyboard.press('Backspace');
    await tab.waitForFunction(() => !document.getElementById('answer').textContent);
    assert.deepEqual(wrong, []);
  },

  async 'what is no picture gets a message'() {
    const {tab, wrong} = await open();
    const before = await logits(tab);
    await drop(tab, {name: 'notes.txt', type: 'text/plain', text: 'hello'});
    await says(tab, /cannot read notes\.txt as a picture/);
    await drop(tab, {name: 'broken.png', type: 'image/png', text: '\x89PNG\r\n'});
    await says(tab, /cannot read broken\.png as a picture/);
    await tab.setInputFiles('#file', {name: 'empty.jpg', mimeType: 'image/jpeg', buffer: Buffer.alloc(0)});
    await says(tab, /cannot read empty\.jpg as a picture/);
    await drop(tab, {text: 'a line of text'});
    await says(tab, /^That is not a file/);
    for (const K of ['0', '', '33', '2.5']) {
      await tab.selectOption('#direction', 'w<K>');
      await tab.fill('#size', K);
      await tab.press('#size', 'Tab');
      await says(tab, /^K is a whole number from 1 to 32/);
    }
    assert.deepEqual(await logits(tab), before, 'the picture is another one');
    await tab.setInputFiles('#file', given.images[0].file);
    await says(tab, /^$/);
    assert.deepEqual(wrong, []);
  },

  async 'dark on light is inverted, and photographs are taken'() {
    const {tab, wrong} = await open();
    const {file, logits: expected} = given.images.at(-1);
    const inverted = await tab.evaluate(async source => {
      const bitmap = await createImageBitmap(await (await fetch(source)).blob());
      const canvas = new OffscreenCanvas(32, 32), context = canvas.getContext('2d');
      context.drawImage(bitmap, 0, 0);
      const pixels = context.getImageData(0, 0, 32, 32);
      pixels.data.forEach((value, i) => { pixels.data[i] = i % 4 === 3 ? 255 : 255 - value; });
      context.putImageData(pixels, 0, 0);
      return Array.from(new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer()));
    }, `data:image/png;base64,${readFileSync(file).toString('base64')}`);
    const found = await logitsAfter(tab, () => tab.setInputFiles(
      '#file', {name: 'dark.png', mimeType: 'image/png', buffer: Buffer.from(inverted)}));
    assert.ok(await tab.isChecked('#invert'));
    assert.ok(difference(found, expected) <= TOLERANCE, difference(found, expected));
    await tab.setChecked('#invert', false);
    await tab.waitForFunction(old => document.getElementById('result').dataset.logits !== old, JSON.stringify(found));
    await logitsAfter(tab, () => tab.setInputFiles('#file', given.photo));
    await tab.selectOption('#grid', {label: '14x14 (224 pixels, patches of 16)'});
    await tab.fill('#size', '4');
    await tab.press('#size', 'Tab');
    await tab.click('#play');
    await tab.fill('#step', '120');
    await tab.screenshot({path: join(given.screenshots, 'photo.png'), fullPage: true});
    assert.deepEqual(wrong, []);
  },

  async 'a picture that comes before the model is kept'() {
    let release;
    const held = new Promise(resolve => { release = resolve; });
    const {tab, wrong} = await open({ready: false, prepare: tab => tab.route('**/model.onnx', async route => {
      await held;
      await route.continue();
    })});
    const {file, logits: expected} = given.images[0];
    await tab.waitForFunction(() => document.querySelectorAll('#examples button').length);
    await tab.setInputFiles('#file', file);
    await tab.waitForFunction(() => !document.getElementById('invert').disabled);
    release();
    assert.ok(difference(await logits(tab), expected) <= TOLERANCE);
    await says(tab, /^$/);
    assert.deepEqual(wrong, []);
  },

  async 'a folder that was not built, or holds half, says so'() {
    const missing = name => tab => tab.route(`**/${name}`, route => route.fulfill({status: 404}));
    const {tab} = await open({ready: false, prepare: missing('demo.json')});
    await says(tab, /cannot start: it is not built.*make web-demo/);
    const {tab: half} = await open({ready: false, prepare: missing('model.onnx')});
    await says(half, /cannot start: /);
  },

  async 'every width and both colour schemes are usable'() {
    for (const [width, colorScheme] of [[375, 'light'], [375, 'dark'], [1280, 'light'], [1280, 'dark']]) {
      const {tab, wrong} = await open({context: {viewport: {width, height: 900}, colorScheme}});
      await tab.click('#play');
      await tab.fill('#size', '3');
      await tab.press('#size', 'Tab');
      await tab.fill('#step', '60');
      const used = await tab.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(used <= width, `${used} pixels of ${width}`);
      await tab.evaluate(axe.source);
      const {violations} = await tab.evaluate(() => globalThis.axe.run());
      assert.deepEqual(violations.map(({id, nodes}) => `${id}: ${nodes.map(node => node.html).join(' ')}`), []);
      await tab.screenshot({path: join(given.screenshots, `${width}-${colorScheme}.png`), fullPage: true});
      assert.deepEqual(wrong, []);
    }
  },

  async 'the time of an image is measured'() {
    const {tab, wrong} = await open({context: {reducedMotion: 'reduce'}});
    await tab.click('#measure');
    await tab.waitForFunction(() => /last 50/.test(document.getElementById('time').textContent));
    const text = await tab.textContent('#time');
    assert.match(text, /^\d+\.\d ms for this image; median of the last 50: \d+\.\d ms, 1 thread\.$/);
    assert.deepEqual(wrong, []);
    return text;
  },
};

const chosen = Object.entries(checks).filter(([name]) => name.includes(given.only));
assert.ok(chosen.length, `no check's name holds ${given.only}: ${Object.keys(checks).join('; ')}`);
let failed = 0;
for (const [name, check] of chosen) {
  try {
    const note = await check();
    console.log(`ok      ${name}${note ? ` (${note})` : ''}`);
  } catch (error) {
    failed++;
    console.log(`FAILED  ${name}\n${error.stack}`);
  }
  await Promise.all(browser.contexts().map(context => context.close()));
}
console.log(`${browser.version()}: ${chosen.length - failed} passed, ${failed} failed; ` +
  `screenshots: ${given.screenshots}`);
await browser.close();
process.exit(failed ? 1 : 0);
