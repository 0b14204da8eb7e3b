// A sandbox's life: made, found, listed, given time, put to sleep, woken, copied, ended.

import { randomUUID } from 'node:crypto'
import { assert, refusal, sdk, Sandbox, test, until, withSandbox } from './suite.mjs'

const at = { 'X-API-KEY': process.env.E2B_API_KEY }

test(
  'a sandbox is made and ended',
  { covers: ['Sandbox.create', 'Sandbox.isRunning', 'Sandbox.kill', 'Sandbox.getInfo'] },
  async () => {
    const sandbox = await Sandbox.create('base', { timeoutMs: 60_000, envs: { COLOUR: 'blue' } })
    assert.ok(sandbox.sandboxId)
    assert.equal(await sandbox.isRunning(), true)
    assert.equal((await sandbox.commands.run('echo $COLOUR')).stdout, 'blue\n')
    const info = await sandbox.getInfo()
    assert.equal(info.sandboxId, sandbox.sandboxId)
    assert.equal(info.templateId, 'base')
    assert.equal(info.name, 'base')
    assert.equal(info.state, 'running')
    assert.ok(info.cpuCount >= 1)
    assert.ok(info.memoryMB >= 128)
    const whole = info.endAt - info.startedAt
    assert.ok(whole > 50_000 && whole <= 61_000)
    assert.equal(await sandbox.kill(), true)
    assert.equal(await sandbox.kill(), false)
    assert.equal(await sandbox.isRunning(), false)
    assert.ok((await refusal(sandbox.getInfo())) instanceof sdk.SandboxNotFoundError)
    assert.match((await refusal(Sandbox.create('no-such-one'))).message, /no-such-one/)
    const bad = await refusal(Sandbox.create('base', { apiKey: `e2b_${'0'.repeat(40)}` }))
    assert.ok(bad instanceof sdk.AuthenticationError)
  },
)

test('all of it by id', { covers: ['Sandbox.getFullInfo', 'Sandbox.connect'] }, async () => {
  const sandbox = await Sandbox.create('base', { timeoutMs: 60_000 })
  await sandbox.files.write('note', 'left here')
  const other = await Sandbox.connect(sandbox.sandboxId)
  assert.equal(other.sandboxId, sandbox.sandboxId)
  assert.equal(await other.files.read('note'), 'left here')
  const info = await Sandbox.getFullInfo(sandbox.sandboxId)
  assert.equal(info.sandboxId, sandbox.sandboxId)
  assert.equal((await Sandbox.getInfo(sandbox.sandboxId)).state, 'running')
  assert.equal(await Sandbox.kill(sandbox.sandboxId), true)
  assert.equal(await Sandbox.kill(sandbox.sandboxId), false)
  assert.ok((await refusal(Sandbox.connect(randomUUID()))) instanceof sdk.SandboxNotFoundError)
})

async function all(paginator) {
  const items = []
  while (paginator.hasNext) items.push(...(await paginator.nextItems()))
  return items
}

test(
  'sandboxes are listed by what they are',
  { covers: ['SandboxPaginator.nextItems'], differs: { 'it is true after the daemon was started again, however it ended': ['Sandbox.list'] } },
  async () => {
    const metadata = { of: randomUUID() }
    const one = await Sandbox.create('base', { metadata: { ...metadata, n: 'a b&c=ü' } })
    const two = await Sandbox.create('base', { metadata })
    const ids = async (query, more) => {
      const items = await all(Sandbox.list({ query, ...more }))
      return items.map((it) => it.sandboxId)
    }
    try {
      assert.deepEqual(await ids({ metadata }), [two.sandboxId, one.sandboxId])
      assert.deepEqual(await ids({ metadata }, { order: 'asc' }), [one.sandboxId, two.sandboxId])
      assert.deepEqual(await ids({ metadata: { n: 'a b&c=ü', ...metadata } }), [one.sandboxId])
      const paginator = Sandbox.list({ query: { metadata }, limit: 1 })
      assert.equal(paginator.hasNext, true)
      const [first] = await paginator.nextItems()
      assert.equal(first.sandboxId, two.sandboxId)
      assert.deepEqual(first.metadata, metadata)
      assert.ok(paginator.nextToken)
      const [second] = await paginator.nextItems()
      assert.equal(second.sandboxId, one.sandboxId)
      assert.equal(paginator.hasNext, false)
      await one.pause()
      assert.deepEqual(await ids({ metadata, state: ['paused'] }), [one.sandboxId])
      assert.deepEqual(await ids({ metadata, state: ['running'] }), [two.sandboxId])
    } finally {
      await one.kill()
      await two.kill()
    }
    assert.deepEqual(await ids({ metadata }), [])
  },
)

withSandbox(
  'its time is shortened and lengthened',
  { differs: { 'there is no longest time, unless the daemon is given one': ['Sandbox.setTimeout'] } },
  async (sandbox) => {
    const left = async () => (await sandbox.getInfo()).endAt - Date.now()
    await sandbox.setTimeout(600_000)
    assert.ok((await left()) > 590_000)
    await Sandbox.setTimeout(sandbox.sandboxId, 5_000)
    assert.ok((await left()) <= 5_000)
    await sandbox.setTimeout(100 * 3_600_000)
    assert.ok((await left()) > 99 * 3_600_000)
  },
)

test('when its time is over it is ended', {}, async () => {
  const sandbox = await Sandbox.create('base', { timeoutMs: 2_000 })
  await until(async () => !(await sandbox.isRunning()))
  assert.ok((await refusal(sandbox.connect())) instanceof sdk.SandboxNotFoundError)
})

test('when its time is over it sleeps, and a request wakes it', {}, async () => {
  const lifecycle = { onTimeout: 'pause', autoResume: true }
  const sandbox = await Sandbox.create('base', { timeoutMs: 2_000, lifecycle })
  try {
    await sandbox.files.write('kept', 'kept')
    await until(async () => (await sandbox.getInfo()).state === 'paused')
    assert.equal(await sandbox.files.read('kept'), 'kept')
    assert.equal((await sandbox.getInfo()).state, 'running')
  } finally {
    await sandbox.kill()
  }
})

withSandbox(
  'sleeps lose nothing',
  {
    differs: {
      'in sandbox isolation, what runs is kept for as long as the daemon runs; files always': ['Sandbox.pause'],
    },
    covers: ['Sandbox.betaPause'],
  },
  async (sandbox) => {
    const line = 'i=0; while :; do i=$((i+1)); echo $i > /home/user/count; sleep 0.02; done'
    const running = await sandbox.commands.run(line, { background: true, timeoutMs: 0 })
    const count = async () => {
      const text = (await sandbox.files.exists('count')) && (await sandbox.files.read('count'))
      return text && Number(text)
    }
    let last = 0
    for (let turn = 0; turn < 20; turn += 1) {
      assert.equal(await (turn === 19 ? sandbox.betaPause() : sandbox.pause()), true)
      assert.equal(await sandbox.isRunning(), false)
      await sandbox.connect()
      const now = await until(count)
      assert.ok(now >= last)
      last = now
    }
    assert.ok((await sandbox.commands.list()).some((it) => it.pid === running.pid))
    await until(async () => (await count()) > last)
    assert.equal(await sandbox.commands.kill(running.pid), true)
    assert.equal(await sandbox.pause(), true)
    assert.equal(await sandbox.pause(), false)
    assert.ok((await refusal(sandbox.files.read('count'))) instanceof sdk.SandboxError)
  },
)

withSandbox(
  'a fork has the files and a life of its own',
  { differs: { 'files are copied; what runs is only in microVMs': ['Sandbox.fork'] } },
  async (sandbox) => {
    await sandbox.files.write('state', 'before')
    const forks = await sandbox.fork({ count: 2, timeoutMs: 60_000 })
    assert.equal(forks.length, 2)
    for (const fork of forks) {
      assert.equal(await fork.files.read('state'), 'before')
      await fork.files.write('state', 'after')
      assert.equal(await fork.kill(), true)
    }
    assert.equal(await sandbox.files.read('state'), 'before')
    const [one] = await Sandbox.fork(sandbox.sandboxId)
    assert.notEqual(one.sandboxId, sandbox.sandboxId)
    assert.equal(await one.kill(), true)
  },
)

withSandbox(
  'a snapshot is what new sandboxes begin with',
  {
    differs: { 'it has files; what ran only in microVMs': ['Sandbox.createSnapshot'] },
    covers: ['Sandbox.listSnapshots', 'Sandbox.deleteSnapshot', 'SnapshotPaginator.nextItems'],
  },
  async (sandbox) => {
    await sandbox.files.write('state', 'of the snapshot')
    const name = `it-${randomUUID()}`
    const taken = await sandbox.createSnapshot({ name })
    assert.ok(taken.snapshotId)
    assert.ok(taken.names.some((it) => it.includes(name)))
    await sandbox.files.write('state', 'later')
    const made = await Sandbox.create(taken.snapshotId, { timeoutMs: 60_000 })
    assert.equal(await made.files.read('state'), 'of the snapshot')
    await made.kill()
    const listed = await Sandbox.listSnapshots({ sandboxId: sandbox.sandboxId }).nextItems()
    assert.deepEqual(listed.map((it) => it.snapshotId), [taken.snapshotId])
    assert.equal((await sandbox.listSnapshots().nextItems()).length, 1)
    assert.equal(await Sandbox.deleteSnapshot(taken.snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(taken.snapshotId), false)
  },
)

withSandbox(
  'what it uses is measured',
  { differs: { 'what the kernel keeps of files is not counted apart: mem_cache is 0': ['Sandbox.getMetrics'] } },
  async (sandbox) => {
    const [first] = await sandbox.getMetrics()
    assert.ok(first.cpuCount >= 1)
    assert.ok(first.memUsed > 0 && first.memUsed < first.memTotal)
    assert.ok(first.diskUsed >= 0 && first.diskUsed < first.diskTotal)
    assert.ok(first.timestamp instanceof Date)
    const later = new Date(Date.now() + 3_600_000)
    assert.deepEqual(await sandbox.getMetrics({ start: later }), [])
    assert.ok((await Sandbox.getMetrics(sandbox.sandboxId)).length >= 1)
  },
)

withSandbox('its log says what has happened', {}, async (sandbox) => {
  await sandbox.pause()
  await sandbox.connect()
  const url = `${process.env.E2B_API_URL}/v2/sandboxes/${sandbox.sandboxId}/logs`
  const { logs } = await (await fetch(url, { headers: at })).json()
  const messages = logs.map((line) => line.message)
  assert.ok(messages.indexOf('paused') >= 0)
  assert.ok(messages.indexOf('paused') < messages.indexOf('resumed'))
})

test('a client has settings of its own', {}, async () => {
  const { E2B_API_KEY: apiKey, E2B_API_URL: apiUrl, E2B_SANDBOX_URL: sandboxUrl } = process.env
  const client = new sdk.E2B({ apiKey, apiUrl, sandboxUrl })
  const sandbox = await client.Sandbox.create('base', { timeoutMs: 60_000 })
  assert.equal((await sandbox.commands.run('echo here')).stdout, 'here\n')
  assert.equal(await sandbox.kill(), true)
})

test('ten at once are all made', {}, async () => {
  const made = await Promise.all(
    Array.from({ length: 10 }, () => Sandbox.create('base', { timeoutMs: 60_000 })),
  )
  assert.equal(new Set(made.map((it) => it.sandboxId)).size, 10)
  const told = await Promise.all(made.map((it, n) => it.commands.run(`echo ${n}`)))
  told.forEach((it, n) => assert.equal(it.stdout, `${n}\n`))
  assert.ok((await Promise.all(made.map((it) => it.kill()))).every(Boolean))
})
