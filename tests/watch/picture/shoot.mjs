// Opens the page in Chromium with its settings and takes its picture:
//   node shoot.mjs SETTINGS.json CHROMIUM TO.png
import { readFileSync } from 'node:fs';
import react from '@vitejs/plugin-react';
import { chromium } from 'playwright-core';
import { createServer } from 'vite';

const [file, executablePath, to] = process.argv.slice(2);
const settings = readFileSync(file, 'utf8');
const server = await createServer({
  root: import.meta.dirname,
  configFile: false,
  logLevel: 'error',
  plugins: [react()],
  define: { 'process.env': {} },
  // All of the library before the page is opened: it would be loaded anew for each part found.
  optimizeDeps: { include: ['@grafana/data', '@grafana/ui', 'react', 'react-dom/client', 'rxjs'] },
  server: { host: '127.0.0.1', port: 0, hmr: false },
});
await server.listen();
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu'] });
const page = await browser.newPage({ viewport: { width: 1368, height: 900 }, deviceScaleFactor: 1 });
page.on('pageerror', (error) => console.error(error));
await page.addInitScript(`window.settings = ${settings}`);
await page.goto(server.resolvedUrls.local[0], { timeout: 300000 });
await page.waitForSelector('[data-drawn]', { timeout: 300000, state: 'attached' });
await page.locator('#page').screenshot({ path: to });
await browser.close();
await server.close();
