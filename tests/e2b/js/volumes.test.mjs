// Volumes: files that outlive sandboxes.

import { randomUUID } from 'node:crypto'
import { assert, face, refusal, sdk, Sandbox, test, Volume } from './suite.mjs'

test(
  'a volume is made, found and removed',
  { covers: ['Volume.create', 'Volume.list', 'Volume.getInfo', 'Volume.connect', 'Volume.destroy'] },
  async () => {
    const name = `it-${randomUUID()}`
    const volume = await Volume.create(name)
    assert.equal(volume.name, name)
    assert.ok(volume.token)
    assert.equal((await Volume.getInfo(volume.volumeId)).name, name)
    assert.ok((await Volume.list()).some((it) => it.volumeId === volume.volumeId))
    assert.match((await refusal(Volume.create(name))).message, /already/)
    const again = await Volume.connect(volume.volumeId)
    await again.writeFile('/note', 'kept')
    assert.equal(await volume.readFile('/note'), 'kept')
    assert.equal(await Volume.destroy(volume.volumeId), true)
    assert.equal(await Volume.destroy(volume.volumeId), false)
    assert.ok((await refusal(Volume.getInfo(volume.volumeId))) instanceof sdk.VolumeNotFoundError)
  },
)

test(
  'files of a volume are read and written, and sandboxes have them',
  {
    covers: [
      'Volume.writeFile',
      'Volume.readFile',
      'Volume.makeDir',
      'Volume.exists',
      'Volume.updateMetadata',
      'Volume.remove',
    ],
  },
  async () => {
    const volume = await Volume.create(`it-${randomUUID()}`)
    try {
      const entry = await volume.writeFile('/note', 'Grüße')
      assert.equal(entry.path, '/note')
      assert.equal(entry.type, 'file')
      assert.equal(entry.size, 7)
      assert.ok(entry.mtime instanceof Date)
      assert.equal(await volume.readFile('/note'), 'Grüße')
      assert.equal(await volume.exists('/note'), true)
      assert.equal(await volume.exists('/none'), false)
      assert.ok((await refusal(volume.readFile('/none'))) instanceof sdk.VolumePathNotFoundError)
      assert.ok((await refusal(volume.writeFile('/note', 'other'))) instanceof sdk.VolumeError)
      await volume.writeFile('/note', 'other', { force: true })
      const every = Uint8Array.from({ length: 256 }, (_, n) => n)
      await volume.writeFile('/bytes', every.buffer)
      assert.deepEqual(await volume.readFile('/bytes', { format: 'bytes' }), every)
      await volume.makeDir('/deep/er', { force: true, mode: 0o700 })
      assert.ok((await refusal(volume.makeDir('/deep'))) instanceof sdk.VolumeError)
      const changed = await volume.updateMetadata('/note', { uid: 1001, mode: 0o600 })
      assert.equal(changed.uid, 1001)
      assert.equal(changed.mode, 0o600)
      await volume.updateMetadata('/note', { uid: 1000, mode: 0o644 })
      assert.deepEqual((await volume.list('/')).map((it) => it.name), ['bytes', 'deep', 'note'])
      const make = () => Sandbox.create('base', { timeoutMs: 60_000, volumeMounts: { '/mnt/data': volume.name } })
      const writer = await make()
      assert.equal(await writer.files.read('/mnt/data/note'), 'other')
      await writer.commands.run('echo from within >/mnt/data/within')
      await writer.kill()
      const reader = await make()
      assert.equal(await reader.files.read('/mnt/data/within'), 'from within\n')
      await reader.kill()
      await volume.remove('/deep')
      assert.equal(await volume.exists('/deep/er'), false)
      const other = face(new sdk.Volume(randomUUID(), 'other', volume.token))
      assert.ok((await refusal(other.readFile('/note'))) instanceof sdk.VolumePathNotFoundError)
    } finally {
      await Volume.destroy(volume.volumeId)
    }
  },
)
