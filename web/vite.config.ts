import { defineConfig } from "vite";

export default defineConfig({
  build: {
    // `dist` has a `.gitignore` of its own, which stays.
    emptyOutDir: false,
    // No data: URLs for scripts or styles, and no script inline in the page.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 700,
  },
});
