import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

export default defineConfig({
  plugins: [react()],
  define: { 'process.env': {} },
  build: { outDir: 'dist', minify: false, chunkSizeWarningLimit: 100000 },
});
