// The suite uses a function that `fs` has since Node 22, for something that is not done here; with
// this it is also run by the Node before that.

import { register } from "node:module";

const fs = "export * from 'node:fs'; export const globSync = () => [];";
const hook = `
  const fs = ${JSON.stringify(`data:text/javascript,${fs}`)};
  export const resolve = (name, context, next) =>
    name === "fs" && context.parentURL?.includes("/conformance/")
      ? { url: fs, shortCircuit: true }
      : next(name, context);
`;
register(`data:text/javascript,${encodeURIComponent(hook)}`);
