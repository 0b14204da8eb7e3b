// Templates and the code interpreter.

import { randomUUID } from 'node:crypto'
import { mkdirSync, mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { assert, refusal, sdk, Sandbox, Template, template, test, until } from './suite.mjs'

const name = () => `it-${randomUUID()}`

async function within(of, look) {
  const sandbox = await Sandbox.create(of, { timeoutMs: 60_000 })
  try {
    await look(sandbox)
  } finally {
    await sandbox.kill()
  }
}

test(
  'a template has what its steps have done',
  {
    covers: [
      'Template.fromBaseImage',
      'Template.runCmd',
      'Template.setEnvs',
      'Template.setWorkdir',
      'Template.setUser',
      'Template.makeDir',
      'Template.makeSymlink',
      'Template.rename',
      'Template.remove',
      'Template.copy',
      'Template.copyItems',
      'Template.skipCache',
      'Template.exists',
      'Template.aliasExists',
    ],
    differs: { 'there is no cache of steps: a build does all of them': ['Template.build'] },
  },
  async () => {
    const context = mkdtempSync(join(tmpdir(), 'context-'))
    writeFileSync(join(context, 'one.txt'), 'one')
    mkdirSync(join(context, 'folder'))
    writeFileSync(join(context, 'folder/a'), 'a')
    writeFileSync(join(context, 'skip.log'), 'not sent')
    const lines = []
    const called = name()
    const definition = template({ fileContextPath: context, fileIgnorePatterns: ['**/*.log'] })
      .fromBaseImage()
      .skipCache()
      .setEnvs({ COLOUR: 'blue' })
      .runCmd('echo $COLOUR > /home/user/colour; echo built-line')
      .copy('one.txt', '/srv/one.txt')
      .copyItems([{ src: 'folder', dest: '/srv/folder' }])
      .setUser('root')
      .setWorkdir('/srv/app')
      .makeDir('/srv/app/data')
      .runCmd('echo old > old; echo drop > drop')
      .rename('/srv/app/old', '/srv/app/new')
      .makeSymlink('/srv/app/new', '/srv/app/link')
      .remove('/srv/app/drop')
      .setUser('user')
    assert.equal(await Template.exists(called), false)
    const built = await Template.build(definition, called, { onBuildLogs: (line) => lines.push(line.message) })
    assert.ok(built.templateId && built.buildId)
    assert.ok(lines.some((line) => line.includes('built-line')))
    assert.equal(await Template.exists(called), true)
    assert.equal(await Template.aliasExists(called), true)
    await within(called, async ({ files, commands }) => {
      assert.equal(await files.read('/home/user/colour'), 'blue\n')
      assert.equal(await files.read('/srv/one.txt'), 'one')
      assert.equal(await files.read('/srv/folder/a'), 'a')
      assert.equal(await files.read('/srv/app/link'), 'old\n')
      assert.equal(await files.exists('/srv/app/drop'), false)
      const told = await commands.run('echo $COLOUR; whoami; pwd')
      assert.equal(told.stdout, 'blue\nuser\n/srv/app\n')
    })
  },
)

test(
  'a template runs something from the start on',
  {
    covers: [
      'Template.setStartCmd',
      'Template.setReadyCmd',
      'Template.fromTemplate',
      'Template.assignTags',
      'Template.removeTags',
      'Template.getTags',
      'Template.buildInBackground',
      'Template.getBuildStatus',
    ],
  },
  async () => {
    const called = name()
    const serves = template().fromBaseImage().setStartCmd('python3 -m http.server 8000', sdk.waitForPort(8000))
    const one = await Template.build(serves, `${called}:v1`)
    const more = template().fromTemplate(`${called}:v1`).setReadyCmd(sdk.waitForTimeout(100))
    const begun = await Template.buildInBackground(more, `${called}:v2`)
    const status = await until(async () => {
      const told = await Template.getBuildStatus(begun)
      return ['ready', 'error'].includes(told.status) && told
    })
    assert.equal(status.status, 'ready')
    await within(`${called}:v1`, async ({ commands }) => {
      const code = await commands.run("curl -s -o /dev/null -w '%{http_code}' http://localhost:8000/")
      assert.equal(code.stdout, '200')
    })
    await Template.assignTags(`${called}:v1`, ['stable'])
    const tags = Object.fromEntries((await Template.getTags(one.templateId)).map((it) => [it.tag, it.buildId]))
    assert.equal(tags.stable, one.buildId)
    assert.equal(tags.v2, begun.buildId)
    await Template.removeTags(called, 'stable')
    assert.ok(!(await Template.getTags(one.templateId)).some((it) => it.tag === 'stable'))
  },
)

test(
  'what cannot be built is said',
  {
    refused: {
      '501 denizen does not have credentials of a registry in a build (fromImageRegistry)': [
        'Template.fromAWSRegistry',
        'Template.fromGCPRegistry',
      ],
      'the step fails: the image has no `mcp-gateway` or `devcontainer`': [
        'Template.addMcpServer',
        'Template.betaDevContainerPrebuild',
        'Template.betaSetDevContainerStart',
      ],
    },
  },
  async () => {
    const failed = await refusal(Template.build(template().fromBaseImage().runCmd('exit 3'), name()))
    assert.ok(failed instanceof sdk.BuildError)
    assert.match(failed.message, /exit status 3/)
    const access = { accessKeyId: 'a', secretAccessKey: 'b', region: 'eu-west-1' }
    const aws = template().fromAWSRegistry('registry.invalid/a:1', access)
    assert.match((await refusal(Template.build(aws, name()))).message, /fromImageRegistry/)
    const gcp = template().fromGCPRegistry('registry.invalid/a:1', { serviceAccountJSON: { type: 'x' } })
    assert.match((await refusal(Template.build(gcp, name()))).message, /fromImageRegistry/)
    for (const [of, define] of [
      ['mcp-gateway', (it) => it.addMcpServer('exa')],
      ['devcontainer', (it) => it.betaDevContainerPrebuild('/srv')],
      ['devcontainer', (it) => it.betaSetDevContainerStart('/srv')],
    ]) {
      const error = await refusal(Template.build(define(template().fromTemplate(of)), name()))
      assert.match(error.message, new RegExp(of))
    }
  },
)

test(
  'definitions are written down',
  {
    covers: ['Template.toJSON', 'Template.toDockerfile', 'Template.fromDockerfile'],
    differs: {
      'as a step of a build: needs the network, and programs of the image, as ever': [
        'Template.aptInstall',
        'Template.pipInstall',
        'Template.npmInstall',
        'Template.bunInstall',
        'Template.gitClone',
      ],
      'an image that the daemon has not is pulled from its registry, which it must be able to reach': [
        'Template.fromImage',
        'Template.fromPythonImage',
        'Template.fromNodeImage',
        'Template.fromBunImage',
        'Template.fromDebianImage',
        'Template.fromUbuntuImage',
        'Template.fromAlpineImage',
        'Template.fromFedoraImage',
        'Template.fromArchImage',
      ],
    },
  },
  async () => {
    for (const [method, image] of [
      ['fromPythonImage', 'python:3'],
      ['fromNodeImage', 'node:lts'],
      ['fromBunImage', 'oven/bun:latest'],
      ['fromDebianImage', 'debian:stable'],
      ['fromUbuntuImage', 'ubuntu:latest'],
      ['fromAlpineImage', 'alpine:'],
      ['fromFedoraImage', 'fedora:'],
      ['fromArchImage', 'archlinux:'],
    ]) {
      const told = JSON.parse(await Template.toJSON(template()[method]()))
      assert.ok(told.fromImage.includes(image), method)
    }
    const steps = template()
      .fromImage('registry.invalid/a:1')
      .aptInstall('curl')
      .pipInstall('six')
      .npmInstall('left-pad')
      .bunInstall('left-pad')
      .gitClone('https://git.invalid/a.git', '/srv/a')
    assert.match(Template.toDockerfile(template().fromImage('debian:12')), /FROM debian:12/)
    assert.ok((await refusal(Template.build(steps, name()))) instanceof sdk.BuildError)
    const called = name()
    await Template.build(template().fromDockerfile('FROM e2bdev/base\nRUN echo g > /home/user/g\n'), called)
    await within(called, async ({ files }) => assert.equal(await files.read('/home/user/g'), 'g\n'))
  },
)

test(
  'code is run and remembered',
  {
    covers: [
      'Sandbox.runCode',
      'Sandbox.createCodeContext',
      'Sandbox.listCodeContexts',
      'Sandbox.removeCodeContext',
      'Sandbox.restartCodeContext',
    ],
  },
  async () => {
    const sandbox = await Sandbox.create({ timeoutMs: 120_000 })
    try {
      assert.equal((await sandbox.runCode('x = 21')).error, undefined)
      assert.equal((await sandbox.runCode('x * 2')).text, '42')
      const out = []
      const told = await sandbox.runCode("import sys; print('a'); print('b', file=sys.stderr)", {
        onStdout: (it) => out.push(it.line),
      })
      assert.equal(out.join(''), 'a\n')
      assert.equal(told.logs.stderr.join(''), 'b\n')
      const failed = await sandbox.runCode('1 / 0')
      assert.equal(failed.error.name, 'ZeroDivisionError')
      assert.match(failed.error.traceback, /1 \/ 0|1/)
      const drawn = await sandbox.runCode('import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()')
      const picture = drawn.results.find((it) => it.png)
      assert.ok(Buffer.from(picture.png, 'base64').subarray(1, 4).equals(Buffer.from('PNG')))
      const table = await sandbox.runCode("import pandas as pd\npd.DataFrame({'a': [1]})")
      assert.match(table.results[0].html, /<table/)
      const context = await sandbox.createCodeContext({ cwd: '/tmp' })
      assert.equal(context.cwd, '/tmp')
      await sandbox.runCode('x = 1', { context })
      assert.equal((await sandbox.runCode('x', { context })).text, '1')
      assert.equal((await sandbox.runCode('x')).text, '21')
      await sandbox.restartCodeContext(context)
      assert.equal((await sandbox.runCode('x', { context })).error.name, 'NameError')
      assert.ok((await sandbox.listCodeContexts()).some((it) => it.id === context.id))
      await sandbox.removeCodeContext(context)
      assert.ok(!(await sandbox.listCodeContexts()).some((it) => it.id === context.id))
      const late = await refusal(sandbox.runCode('while True: pass', { timeoutMs: 2_000 }))
      assert.ok(late instanceof sdk.TimeoutError)
      assert.equal((await sandbox.runCode('x')).text, '21')
    } finally {
      await sandbox.kill()
    }
  },
)
