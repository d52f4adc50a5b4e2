// Draws guard.json from a live Prometheus, with Grafana's own panels in a headless
// Chromium: what a picture in the docs shows is what an operator gets.
//
//   npm ci && node draw.mjs http://localhost:9090 ../../../docs/dashboard.png [MINUTES [END]]
//
// Grafana's server is not needed. Queries are sent as it would send them, with all
// servers chosen; variables and the time picker are not drawn.

import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { build } from 'esbuild';

const [prometheus, picture, minutes = '30', end] = process.argv.slice(2);
if (!prometheus || !picture) {
  console.error('expected: node draw.mjs PROMETHEUS_URL PICTURE.png [MINUTES [END]]');
  process.exit(2);
}
const STEP = 15;
const to = Math.floor((end ? Date.parse(end) : Date.now()) / 1000);
const from = to - 60 * Number(minutes);
// On the page a unit of height is 38 pixels, as in Grafana.
const UNIT = 38;
const dashboard = JSON.parse(readFileSync(new URL('../guard.json', import.meta.url)));

const rows = dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h);
const size = `1616,${UNIT * Math.max(...rows) + 8}`;

function fillIn(expression) {
  return expression
    .replaceAll('$__rate_interval', `${4 * STEP}s`)
    .replaceAll('$__range', `${to - from}s`)
    .replace(/\$\w+/g, '.*');
}

async function ask({ expr, instant }) {
  const when = instant ? { time: to } : { start: from, end: to, step: STEP };
  const words = new URLSearchParams({ query: fillIn(expr), ...when });
  const route = instant ? 'query' : 'query_range';
  const answer = await fetch(`${prometheus}/api/v1/${route}?${words}`);
  const body = await answer.json();
  if (body.status !== 'success') throw new Error(`${expr}: ${body.error}`);
  return body.data.result;
}

for (const panel of dashboard.panels) {
  for (const target of panel.targets ?? []) target.result = await ask(target);
}

const folder = mkdtempSync(join(tmpdir(), 'draw-'));
try {
  const script = join(folder, 'page.js');
  await build({
    entryPoints: [new URL('page.jsx', import.meta.url).pathname],
    bundle: true,
    outfile: script,
    jsx: 'automatic',
    define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
    loader: { '.svg': 'text', '.ttf': 'empty' },
    logLevel: 'error',
  });
  const data = JSON.stringify({ dashboard, from, to }).replaceAll('<', '\\u003c');
  writeFileSync(
    join(folder, 'page.html'),
    `<!doctype html><meta charset="utf-8">
<link rel="stylesheet" href="page.css"><div id="root"></div>
<script>window.shown = ${data}</script><script src="page.js"></script>`
  );
  execFileSync('chromium', [
    ...['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars'],
    ...['--allow-file-access-from-files', '--virtual-time-budget=20000'],
    ...['--enable-logging=stderr', '--v=0'],
    `--window-size=${size}`,
    `--user-data-dir=${join(folder, 'profile')}`,
    `--screenshot=${picture}`,
    `file://${join(folder, 'page.html')}`,
  ], { stdio: process.env.DRAW_VERBOSE ? 'inherit' : 'ignore' });
} finally {
  rmSync(folder, { recursive: true, force: true });
}
