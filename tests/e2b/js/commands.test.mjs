// Commands and terminals.

import { assert, refusal, sdk, Sandbox, test, until, withSandbox } from './suite.mjs'

withSandbox('a command is run to its end', { covers: ['Commands.run'] }, async (sandbox) => {
  const told = await sandbox.commands.run('echo out; echo err >&2')
  assert.equal(told.stdout, 'out\n')
  assert.equal(told.stderr, 'err\n')
  assert.equal(told.exitCode, 0)
  const failed = await refusal(sandbox.commands.run('echo so far; echo no >&2; exit 7'))
  assert.ok(failed instanceof sdk.CommandExitError)
  assert.equal(failed.exitCode, 7)
  assert.equal(failed.stdout, 'so far\n')
  assert.equal(failed.stderr, 'no\n')
  assert.equal((await refusal(sandbox.commands.run('no-such-program'))).exitCode, 127)
  assert.equal((await sandbox.commands.run('whoami; pwd')).stdout, 'user\n/home/user\n')
  assert.equal((await sandbox.commands.run('whoami', { user: 'root' })).stdout, 'root\n')
  assert.equal((await sandbox.commands.run('pwd', { cwd: '/tmp' })).stdout, '/tmp\n')
  assert.equal((await sandbox.commands.run('echo $A', { envs: { A: 'x y' } })).stdout, 'x y\n')
  assert.equal((await sandbox.commands.run("echo 'grüße 🦀'")).stdout, 'grüße 🦀\n')
  assert.ok((await refusal(sandbox.commands.run('true', { user: 'nobody-here' }))) instanceof Error)
  assert.ok((await refusal(sandbox.commands.run('true', { cwd: '/no/folder' }))) instanceof Error)
})

withSandbox('output is told as it comes', {}, async (sandbox) => {
  const seen = []
  const told = await sandbox.commands.run('for i in 1 2 3; do echo $i; sleep 0.2; done; echo e >&2', {
    onStdout: (text) => seen.push(text),
    onStderr: (text) => seen.push(`err ${text}`),
  })
  assert.deepEqual(seen, ['1\n', '2\n', '3\n', 'err e\n'])
  assert.equal(told.stdout, '1\n2\n3\n')
  const much = await sandbox.commands.run('seq 1 200000')
  assert.equal(much.stdout.split('\n').length, 200001)
  assert.ok(much.stdout.endsWith('200000\n'))
})

const count = async (sandbox, mark) => {
  const line = `grep -lz '${mark[0]}[${mark[1]}]${mark.slice(2)}' /proc/[0-9]*/cmdline 2>/dev/null | wc -l`
  return Number((await sandbox.commands.run(line, { user: 'root' })).stdout)
}

withSandbox('a timeout and a kill end the whole tree', {}, async (sandbox) => {
  const tree = (mark) => `sh -c 'setsid sh -c "exec sleep ${mark}" & sh -c "sleep ${mark} & wait"'`
  const late = await refusal(sandbox.commands.run(tree(81818), { timeoutMs: 1_000 }))
  assert.ok(late instanceof sdk.TimeoutError)
  await until(async () => (await count(sandbox, '81818')) === 0)
  const running = await sandbox.commands.run(tree(82828), { background: true, timeoutMs: 0 })
  await until(async () => (await count(sandbox, '82828')) >= 2)
  assert.equal(await running.kill(), true)
  assert.ok((await refusal(running.wait())) instanceof sdk.CommandExitError)
  await until(async () => (await count(sandbox, '82828')) === 0)
  assert.equal(await running.kill(), false)
})

withSandbox(
  'a command in the background',
  {
    covers: [
      'Commands.list',
      'Commands.kill',
      'Commands.connect',
      'CommandHandle.wait',
      'CommandHandle.kill',
      'CommandHandle.disconnect',
    ],
  },
  async (sandbox) => {
    const line = 'echo begun; while read -r line; do echo got $line; done'
    const first = await sandbox.commands.run(line, { background: true, stdin: true, timeoutMs: 0 })
    await until(() => first.stdout === 'begun\n')
    assert.equal(first.exitCode, undefined)
    const found = (await sandbox.commands.list()).find((it) => it.pid === first.pid)
    assert.equal(found.cmd, '/bin/bash')
    assert.deepEqual(found.args, ['-l', '-c', line])
    await first.disconnect()
    const other = await Sandbox.connect(sandbox.sandboxId)
    let heard = ''
    const again = await other.commands.connect(first.pid, {
      onStdout: (text) => (heard += text),
      timeoutMs: 0,
    })
    assert.equal(again.pid, first.pid)
    await other.commands.sendStdin(first.pid, 'a\n')
    await until(() => heard === 'got a\n')
    assert.equal(await sandbox.commands.kill(first.pid), true)
    const ended = await refusal(again.wait())
    assert.ok(ended instanceof sdk.CommandExitError)
    assert.equal(await sandbox.commands.kill(first.pid), false)
    assert.ok((await refusal(sandbox.commands.connect(999_999))) instanceof sdk.NotFoundError)
    const good = await sandbox.commands.run('echo out', { background: true })
    assert.equal((await good.wait()).stdout, 'out\n')
    assert.equal((await good.wait()).exitCode, 0)
    const last = await sandbox.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
    assert.equal(await last.kill(), true)
  },
)

withSandbox(
  'what a command reads',
  {
    covers: [
      'Commands.sendStdin',
      'Commands.closeStdin',
      'CommandHandle.sendStdin',
      'CommandHandle.closeStdin',
    ],
  },
  async (sandbox) => {
    const cat = await sandbox.commands.run('cat', { background: true, stdin: true, timeoutMs: 0 })
    await sandbox.commands.sendStdin(cat.pid, 'by pid\n')
    await cat.sendStdin('by handle\n')
    await cat.sendStdin(new TextEncoder().encode('bytes ä\n'))
    await until(() => cat.stdout === 'by pid\nby handle\nbytes ä\n')
    await cat.closeStdin()
    assert.equal((await cat.wait()).exitCode, 0)
    const wc = await sandbox.commands.run('wc -c', { background: true, stdin: true, timeoutMs: 0 })
    await wc.sendStdin('x'.repeat(300_000))
    await sandbox.commands.closeStdin(wc.pid)
    assert.equal((await wc.wait()).stdout.trim(), '300000')
    const deaf = await sandbox.commands.run('sleep 1000', { background: true, stdin: false, timeoutMs: 0 })
    assert.ok((await refusal(deaf.sendStdin('x'))) instanceof sdk.SandboxError)
    assert.equal(await deaf.kill(), true)
  },
)

test('when its sandbox is ended a command ends at once', {}, async () => {
  const sandbox = await Sandbox.create('base', { timeoutMs: 60_000 })
  const front = refusal(sandbox.commands.run('echo > /tmp/begun; sleep 1000', { timeoutMs: 0 }))
  const back = await sandbox.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const waits = refusal(back.wait())
  await until(() => sandbox.files.exists('/tmp/begun'))
  const began = Date.now()
  assert.equal(await sandbox.kill(), true)
  for (const refused of [await front, await waits]) {
    assert.equal(refused.name, 'TimeoutError')
    assert.match(refused.message, /the sandbox is being ended/)
  }
  assert.ok(Date.now() - began < 10_000)
})

const text = (pieces) => Buffer.concat(pieces).toString()
const bytes = (line) => new TextEncoder().encode(line)

withSandbox(
  'a shell in a terminal',
  { covers: ['Pty.create', 'Pty.sendInput', 'Pty.resize', 'Pty.connect', 'Pty.kill'] },
  async (sandbox) => {
    const seen = []
    const onData = (data) => seen.push(data)
    const terminal = await sandbox.pty.create({ rows: 30, cols: 100, onData, envs: { ABC: '1' }, timeoutMs: 0 })
    await sandbox.pty.sendInput(terminal.pid, bytes('echo $ABC-$TERM; stty size; whoami\n'))
    await until(() => text(seen).includes('30 100') && text(seen).includes('1-xterm'))
    assert.match(text(seen), /user/)
    await sandbox.pty.resize(terminal.pid, { rows: 33, cols: 144 })
    await sandbox.pty.sendInput(terminal.pid, bytes('stty size\n'))
    await until(() => text(seen).includes('33 144'))
    await terminal.disconnect()
    const more = []
    const again = await sandbox.pty.connect(terminal.pid, { onData: (data) => more.push(data), timeoutMs: 0 })
    assert.equal(again.pid, terminal.pid)
    await sandbox.pty.sendInput(terminal.pid, bytes('echo a$((1+1))b\n'))
    await until(() => text(more).includes('a2b'))
    assert.equal(await sandbox.pty.kill(terminal.pid), true)
    assert.ok((await refusal(again.wait())) instanceof sdk.CommandExitError)
    assert.equal(await sandbox.pty.kill(terminal.pid), false)
    const ends = await sandbox.pty.create({ rows: 24, cols: 80, onData: () => {} })
    await sandbox.pty.sendInput(ends.pid, bytes('exit\n'))
    assert.equal((await ends.wait()).exitCode, 0)
  },
)

withSandbox(
  "the SDK's git",
  {
    covers: [
      'Git.init',
      'Git.configureUser',
      'Git.setConfig',
      'Git.getConfig',
      'Git.add',
      'Git.commit',
      'Git.status',
      'Git.branches',
      'Git.createBranch',
      'Git.checkoutBranch',
      'Git.deleteBranch',
      'Git.reset',
      'Git.restore',
      'Git.remoteAdd',
      'Git.remoteGet',
      'Git.push',
      'Git.clone',
      'Git.pull',
    ],
    differs: {
      "the credentials are kept in the sandbox's files, as the name says": ['Git.dangerouslyAuthenticate'],
    },
  },
  async (sandbox) => {
    const { git, files } = sandbox
    await git.configureUser('Some Body', 'body@example.com')
    assert.equal(await git.getConfig('user.name'), 'Some Body')
    await git.init('/home/user/there.git', { bare: true, initialBranch: 'main' })
    await git.init('here', { initialBranch: 'main' })
    await git.setConfig('core.filemode', 'false', { scope: 'local', path: 'here' })
    await files.write('here/file', 'one')
    const status = await git.status('here')
    assert.equal(status.currentBranch, 'main')
    assert.deepEqual(status.fileStatus.map((it) => it.name), ['file'])
    await git.add('here')
    await git.commit('here', 'One')
    assert.equal((await git.status('here')).isClean, true)
    await git.createBranch('here', 'side')
    assert.equal((await git.branches('here')).currentBranch, 'side')
    await git.checkoutBranch('here', 'main')
    await git.deleteBranch('here', 'side')
    assert.deepEqual((await git.branches('here')).branches, ['main'])
    await files.write('here/file', 'two')
    await git.add('here')
    await git.reset('here', { paths: ['file'] })
    await git.restore('here', { paths: ['file'] })
    assert.equal(await files.read('here/file'), 'one')
    await git.remoteAdd('here', 'origin', '/home/user/there.git')
    assert.equal(await git.remoteGet('here', 'origin'), '/home/user/there.git')
    await git.push('here', { remote: 'origin', branch: 'main' })
    await git.clone('/home/user/there.git', { path: 'copy' })
    await files.write('here/file', 'three')
    await git.add('here')
    await git.commit('here', 'Three')
    await git.push('here')
    await git.pull('copy')
    assert.equal(await files.read('copy/file'), 'three')
    await git.dangerouslyAuthenticate({ username: 'someone', password: 'secret', host: 'git.example' })
    const line = "printf 'protocol=https\\nhost=git.example\\n\\n' | git credential fill"
    assert.match((await sandbox.commands.run(line)).stdout, /password=secret/)
  },
)
