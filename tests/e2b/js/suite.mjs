// What the cases are written with: the SDK behind a face that records which of its methods were
// called, assertions that are counted, and `test`, which notes what a case that passes has shown.
//
// E2B_MODULES is the folder that the SDK is in, E2B_OUTCOMES the one for what was shown.

import strict from 'node:assert/strict'
import { readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { basename, join } from 'node:path'
import { test as run } from 'node:test'

const modules = process.env.E2B_MODULES
const require = createRequire(join(modules, 'suite.cjs'))
export const sdk = require('@e2b/code-interpreter')

const called = new Set()
const outcomes = []
let assertions = 0

// What each class of the declarations is called in the table.
const CLASSES = {
  Sandbox: 'Sandbox',
  SandboxApi: 'Sandbox',
  SandboxPaginator: 'SandboxPaginator',
  SnapshotPaginator: 'SnapshotPaginator',
  Commands: 'Commands',
  CommandHandle: 'CommandHandle',
  Pty: 'Pty',
  Filesystem: 'Filesystem',
  WatchHandle: 'WatchHandle',
  Git: 'Git',
  TemplateBase: 'Template',
  Volume: 'Volume',
  Secret: 'Secret',
  SecretPaginator: 'SecretPaginator',
}

/** The names of all public methods, as the declarations of the installed SDK have them. */
function methods() {
  const found = new Set()
  for (const path of ['e2b', '@e2b/code-interpreter']) {
    let of = null
    for (const line of readFileSync(join(modules, path, 'dist/index.d.ts'), 'utf8').split('\n')) {
      const begins = /^declare class (\w+)/.exec(line)
      if (begins) of = CLASSES[begins[1]]
      else if (line.startsWith('}')) of = null
      const method = /^ {2}(?:static )?(\w+)(?:<[^(]*>)?\(/.exec(line)
      if (of && method && method[1] !== 'constructor') found.add(`${of}.${method[1]}`)
    }
  }
  return found
}

const faces = new WeakMap()

function className(value) {
  const kind = typeof value === 'function' ? value : value.constructor
  // A client has subclasses of its own.
  for (let it = kind; it?.name !== undefined; it = Object.getPrototypeOf(it)) {
    if (CLASSES[it.name]) return CLASSES[it.name]
    if (it.name === '') break
  }
  return null
}

const bare = (value) => faces.get(value) ?? value

function faced(value) {
  if (Array.isArray(value)) return value.map(faced)
  if (value === null || typeof value !== 'object' || !className(value)) return value
  return face(value)
}

/** An object or a class of the SDK, of which each call is recorded. */
export function face(inner, name = className(inner)) {
  const of = (target, key) => {
    const value = Reflect.get(target, key, inner)
    if (typeof key === 'symbol') return value
    if (typeof value !== 'function') return faced(value)
    return (...args) => {
      called.add(`${name}.${key}`)
      const answer = value.apply(inner, args.map(bare))
      return answer instanceof Promise ? answer.then(faced) : faced(answer)
    }
  }
  const it = new Proxy(inner, { get: of })
  faces.set(it, inner)
  return it
}

export const Sandbox = face(sdk.Sandbox)
export const Template = face(sdk.Template, 'Template')
export const Volume = face(sdk.Volume)
export const Secret = face(sdk.Secret)
/** Begins the definition of a template. */
export const template = (options) => face(sdk.Template(options), 'Template')

/** Assertions, counted. */
export const assert = new Proxy(strict, {
  apply: (target, of, args) => {
    assertions += 1
    return target(...args)
  },
  get: (target, key) => (...args) => {
    assertions += 1
    return target[key](...args)
  },
})

/**
 * A case. `covers` are the methods that work in it, `differs` and `refused` those that do so,
 * by what is to be said of them.
 */
export function test(name, { covers = [], differs = {}, refused = {} }, body) {
  run(name, async (context) => {
    called.clear()
    await body(context)
    const shown = covers.map((method) => ({ method }))
    for (const [result, by] of Object.entries({ differs, refused })) {
      for (const [how, all] of Object.entries(by)) {
        shown.push(...all.map((method) => ({ method, result, how })))
      }
    }
    for (const { method } of shown) strict.ok(called.has(method), `${method} was not called`)
    outcomes.push(...shown)
  })
}

/** A case with a sandbox, which is gone after it. */
export function withSandbox(name, marks, body, options = {}) {
  test(name, marks, async () => {
    const sandbox = await Sandbox.create('base', { timeoutMs: 120_000, ...options })
    try {
      await body(sandbox)
    } finally {
      await sandbox.kill()
    }
  })
}

/** Waits until something is so. */
export async function until(look, what = look.toString(), ms = 20_000) {
  const end = Date.now() + ms
  for (;;) {
    const seen = await look()
    if (seen) return seen
    if (Date.now() > end) throw new Error(`not in time: ${what}`)
    await new Promise((done) => setTimeout(done, 30))
  }
}

/** What a call is refused with. */
export async function refusal(call) {
  try {
    await call
  } catch (error) {
    assertions += 1
    return error
  }
  throw new strict.AssertionError({ message: 'it was not refused' })
}

process.on('exit', () => {
  const folder = process.env.E2B_OUTCOMES
  if (!folder) return
  const told = { assertions, outcomes, methods: [...methods()].sort() }
  writeFileSync(join(folder, `${basename(process.argv[1])}.json`), JSON.stringify(told, null, 1))
})
