// Opens the built page in Chromium with its settings and takes its picture:
//   node shoot.mjs SETTINGS.json CHROMIUM TO.png
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { extname, join } from 'node:path';
import { chromium } from 'playwright-core';

const [file, executablePath, to] = process.argv.slice(2);
const settings = readFileSync(file, 'utf8');
const types = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css' };
const server = createServer((request, answer) => {
  const path = request.url === '/' ? '/index.html' : request.url.split('?')[0];
  try {
    const body = readFileSync(join(import.meta.dirname, 'dist', path));
    answer.writeHead(200, { 'Content-Type': types[extname(path)] ?? 'application/octet-stream' });
    answer.end(body);
  } catch {
    answer.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu'] });
const page = await browser.newPage({ viewport: { width: 1368, height: 900 }, deviceScaleFactor: 1 });
page.on('console', (line) => line.type() === 'error' && console.error(line.text()));
page.on('pageerror', (error) => console.error(error));
await page.addInitScript(`window.settings = ${settings}`);
await page.goto(`http://127.0.0.1:${server.address().port}/`);
await page.waitForSelector('[data-drawn]', { timeout: 60000 });
await page.locator('#page').screenshot({ path: to });
await browser.close();
server.close();
