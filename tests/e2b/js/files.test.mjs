// Files, who reaches them and the ports, and what is refused.

import { assert, face, refusal, sdk, Sandbox, Secret, test, until, withSandbox } from './suite.mjs'

const url = process.env.E2B_SANDBOX_URL

withSandbox(
  'files are written and read in all forms',
  { covers: ['Filesystem.write', 'Filesystem.read', 'Filesystem.exists', 'Filesystem.writeFiles'] },
  async ({ files, commands }) => {
    const written = await files.write('note.txt', 'Grüße\n')
    assert.equal(written.name, 'note.txt')
    assert.equal(written.path, '/home/user/note.txt')
    assert.equal(written.type, 'file')
    assert.equal(await files.read('note.txt'), 'Grüße\n')
    assert.equal(await files.exists('note.txt'), true)
    assert.equal(await files.exists('none'), false)
    assert.equal((await commands.run("stat -c '%a %U' note.txt")).stdout, '644 user\n')
    const all = Uint8Array.from({ length: 2560 }, (_, n) => n % 256)
    await files.write('bytes', all.buffer)
    assert.deepEqual(await files.read('bytes', { format: 'bytes' }), all)
    const blob = await files.read('bytes', { format: 'blob' })
    assert.equal(blob.size, 2560)
    await files.write('blob', new Blob([all]))
    assert.deepEqual(await files.read('blob', { format: 'bytes' }), all)
    const block = new Uint8Array(1 << 20).fill(7)
    let left = 50
    const big = new ReadableStream({
      pull(to) {
        if (left-- > 0) to.enqueue(block)
        else to.close()
      },
    })
    await files.write('big', big, { useOctetStream: true })
    let size = 0
    for await (const piece of await files.read('big', { format: 'stream' })) size += piece.length
    assert.equal(size, 50 << 20)
    const many = await files.writeFiles([
      { path: 'many/one', data: '1' },
      { path: '/tmp/two', data: all.buffer },
    ])
    assert.deepEqual(many.map((it) => it.path), ['/home/user/many/one', '/tmp/two'])
    assert.equal(await files.read('many/one'), '1')
    for (const useOctetStream of [true, false]) {
      await files.write('packed', 'packed '.repeat(1000), { gzip: true, useOctetStream })
      assert.equal(await files.read('packed', { gzip: true }), 'packed '.repeat(1000))
      assert.equal((await commands.run('stat -c %s packed')).stdout, '7000\n')
    }
    const metadata = { author: 'somebody' }
    assert.deepEqual((await files.write('said', 'x', { metadata })).metadata, metadata)
    assert.deepEqual((await files.getInfo('said')).metadata, metadata)
    assert.ok((await refusal(files.read('none'))) instanceof sdk.FileNotFoundError)
    await files.write('/root/of-root', 'x', { user: 'root' })
    assert.equal((await files.getInfo('/root/of-root', { user: 'root' })).owner, 'root')
  },
)

withSandbox(
  'files and folders are looked at and moved',
  {
    covers: [
      'Filesystem.getInfo',
      'Filesystem.list',
      'Filesystem.makeDir',
      'Filesystem.rename',
      'Filesystem.remove',
    ],
  },
  async ({ files, commands }) => {
    assert.equal(await files.makeDir('l/b/c'), true)
    assert.equal(await files.makeDir('l/b/c'), false)
    await commands.run('echo 12345 > l/file; chmod 750 l/file; ln -s file l/link; touch l/b/c/deep')
    const info = await files.getInfo('l/file')
    assert.equal(info.size, 6)
    assert.equal(info.permissions, '-rwxr-x---')
    assert.equal(info.mode & 0o7777, 0o750)
    assert.equal(info.owner, 'user')
    assert.equal(info.group, 'user')
    assert.ok(info.modifiedTime instanceof Date)
    assert.equal((await files.getInfo('l/link')).symlinkTarget, '/home/user/l/file')
    assert.equal((await files.getInfo('l')).type, 'dir')
    const one = await files.list('l')
    assert.deepEqual(one.map((it) => it.name), ['b', 'file', 'link'])
    const three = await files.list('l', { depth: 3 })
    assert.ok(three.some((it) => it.path === '/home/user/l/b/c/deep'))
    assert.ok((await refusal(files.list('l', { depth: 0 }))) instanceof sdk.InvalidArgumentError)
    assert.ok((await refusal(files.list('none'))) instanceof sdk.FileNotFoundError)
    const moved = await files.rename('l/file', 'moved')
    assert.equal(moved.path, '/home/user/moved')
    assert.equal(await files.exists('l/file'), false)
    assert.ok((await refusal(files.rename('none', 'any'))) instanceof sdk.FileNotFoundError)
    await files.remove('l')
    assert.equal(await files.exists('l'), false)
    assert.ok((await refusal(files.getInfo('l'))) instanceof sdk.FileNotFoundError)
  },
)

withSandbox(
  'what happens in a folder is told',
  { covers: ['Filesystem.watchDir', 'WatchHandle.stop'] },
  async ({ files }) => {
    await files.makeDir('w/sub')
    const seen = []
    const watch = await files.watchDir('w', (event) => seen.push(event), { recursive: true, includeEntry: true })
    await files.write('w/file', '12345')
    const written = await until(() => seen.find((it) => it.type === 'write' && it.name === 'file'))
    assert.equal(written.entry.path, '/home/user/w/file')
    assert.equal(written.entry.size, 5)
    assert.ok(seen.some((it) => it.type === 'create' && it.name === 'file'))
    await files.write('w/sub/below', 'x')
    assert.ok(await until(() => seen.find((it) => it.name === 'sub/below')))
    await files.makeDir('w/new')
    await files.write('w/new/file', 'x')
    assert.ok(await until(() => seen.find((it) => it.name === 'new/file')))
    await files.rename('w/file', 'w/other')
    assert.ok(await until(() => seen.find((it) => it.type === 'rename' && it.name === 'file')))
    await files.remove('w/other')
    assert.ok(await until(() => seen.find((it) => it.type === 'remove' && it.name === 'other')))
    await watch.stop()
    assert.ok((await refusal(files.watchDir('none', () => {}))) instanceof sdk.NotFoundError)
    assert.ok((await refusal(files.watchDir('w/new/file', () => {}))) instanceof sdk.SandboxError)
  },
)

const headers = (sandbox, port = 49983, more = {}) => ({
  'E2b-Sandbox-Id': sandbox.sandboxId,
  'E2b-Sandbox-Port': String(port),
  ...more,
})

withSandbox(
  'links are good for what they are for',
  {
    differs: {
      'with E2B_SANDBOX_URL, who uses a link also sends the header E2b-Sandbox-Id': [
        'Sandbox.downloadUrl',
        'Sandbox.uploadUrl',
      ],
    },
  },
  async (sandbox) => {
    await sandbox.files.write('file', 'content')
    const link = await sandbox.downloadUrl('file')
    const got = await fetch(link, { headers: headers(sandbox) })
    assert.equal(await got.text(), 'content')
    const forged = await fetch(link.replace('path=file', 'path=none'), { headers: headers(sandbox) })
    assert.equal(forged.status, 401)
    const old = await sandbox.downloadUrl('file', { useSignatureExpiration: -60_000 })
    assert.equal((await fetch(old, { headers: headers(sandbox) })).status, 401)
    const good = await sandbox.downloadUrl('file', { useSignatureExpiration: 60_000 })
    assert.equal((await fetch(good, { headers: headers(sandbox) })).status, 200)
    const form = new FormData()
    form.append('file', new Blob(['by link']), 'sent')
    const up = await sandbox.uploadUrl('sent')
    const sent = await fetch(up, { method: 'POST', body: form, headers: headers(sandbox) })
    assert.equal(sent.status, 200)
    assert.equal(await sandbox.files.read('sent'), 'by link')
    const bare = await fetch(`${url}/files?path=file&username=user`, { headers: headers(sandbox) })
    assert.ok([401, 403].includes(bare.status))
  },
)

withSandbox(
  'ports are reached by headers, with a token',
  { covers: ['Sandbox.getHost'] },
  async (sandbox) => {
    assert.ok(sandbox.getHost(8000).startsWith(`8000-${sandbox.sandboxId}`))
    await sandbox.files.write('page', 'a page')
    await sandbox.commands.run('python3 -m http.server 8000', { background: true, timeoutMs: 0 })
    await sandbox.commands.run('until (echo > /dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep 0.05; done')
    const token = { 'e2b-traffic-access-token': sandbox.trafficAccessToken }
    const got = await fetch(`${url}/page`, { headers: headers(sandbox, 8000, token) })
    assert.equal(await got.text(), 'a page')
    assert.equal((await fetch(`${url}/page`, { headers: headers(sandbox, 8000) })).status, 403)
    const closed = await fetch(`${url}/`, { headers: headers(sandbox, 8001, token) })
    assert.equal(closed.status, 502)
    assert.equal((await closed.json()).message, 'The sandbox is running but port is not open')
  },
  { network: { allowPublicTraffic: false } },
)

withSandbox('what of the network is open', { covers: ['Sandbox.updateNetwork'] }, async (sandbox) => {
  await sandbox.updateNetwork({ denyOut: ({ allTraffic }) => [allTraffic], allowOut: ['9.9.9.9'] })
  const { network } = await sandbox.getInfo()
  assert.deepEqual(network.denyOut, [sdk.ALL_TRAFFIC])
  assert.deepEqual(network.allowOut, ['9.9.9.9'])
  const line = `python3 -c "import socket; socket.create_connection(('8.8.8.8', 80), 10)"`
  assert.match((await refusal(sandbox.commands.run(line))).stderr, /refused|unreachable/)
  for (const rule of ['not an address', '10.0.0.0/33']) {
    assert.ok((await refusal(Sandbox.create('base', { network: { denyOut: [rule] } }))) instanceof Error)
  }
  const proxy = { egressProxy: { address: 'proxy.example:1080' } }
  assert.match((await refusal(Sandbox.create('base', { network: proxy }))).message, /egressProxy/)
})

const SECRETS = '501 denizen does not have secrets'

test(
  'secrets are refused',
  {
    refused: {
      [SECRETS]: [
        'Secret.create',
        'Secret.update',
        'Secret.getInfo',
        'Secret.list',
        'Secret.exists',
        'Secret.destroy',
        'SecretPaginator.nextItems',
      ],
    },
    covers: ['Secret.fill', 'Secret.iamToken'],
  },
  async () => {
    for (const call of [
      () => Secret.create('A', 'value'),
      () => Secret.update('A', 'value'),
      () => Secret.getInfo('A'),
      () => Secret.exists('A'),
      () => Secret.destroy('A'),
      () => Secret.list().nextItems(),
    ]) {
      assert.match((await refusal(call())).message, /secrets/)
    }
    assert.match(Secret.fill('A'), /A/)
    assert.ok(Secret.iamToken({ audience: 'a', tokenType: 'JWT-SVID' }))
  },
)

withSandbox(
  'the gateway of E2B is not there',
  {
    refused: {
      'FileNotFoundException: there is no gateway in the sandbox; `denizen mcp` serves MCP': ['Sandbox.getMcpToken'],
    },
    differs: { 'the address of a gateway that is not there; `denizen mcp` serves MCP': ['Sandbox.getMcpUrl'] },
  },
  async (sandbox) => {
    assert.match(sandbox.getMcpUrl(), new RegExp(sandbox.sandboxId))
    assert.ok((await refusal(sandbox.getMcpToken())) instanceof sdk.NotFoundError)
    assert.match((await refusal(Sandbox.create({ mcp: { time: {} } }))).message, /mcp/i)
  },
)
