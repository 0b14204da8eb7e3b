// What a session can be put back from.

import { useState } from "preact/hooks";
import * as api from "./api";
import { perform, useLoaded } from "./live";
import { linkTo, nameOf } from "./sessions";
import { ActionsColumn, bytes, Dialog, Empty, Field, short, Table, Trouble, When } from "./ui";

type From = { backup?: string; snapshot?: string };

export function BackupsTab(props: { me: api.Me; session: api.Session; reload: () => Promise<void> }) {
  const { me, session } = props;
  const name = nameOf(session);
  const events = (event: api.LifeEvent) => event.session === session.id;
  const backups = useLoaded(() => api.backups(name), [session.id], { events });
  const snapshots = useLoaded(() => api.snapshots(name), [session.id], { events });
  const [from, setFrom] = useState<From | null>(null);
  const [inUse, setInUse] = useState(false);
  const [naming, setNaming] = useState(false);
  const [busy, setBusy] = useState("");
  const mayAct = me.scope !== "read";

  const act = async (what: string, work: () => Promise<unknown>, done: string) => {
    setBusy(what);
    await perform(work, done);
    setBusy("");
    await Promise.all([props.reload(), backups.reload(), snapshots.reload()]);
  };
  const backUp = () =>
    act(
      "Backing up…",
      async () => {
        try {
          await api.backup(name);
        } catch (error) {
          if (!(error instanceof api.Problem && error.code === "in_use")) throw error;
          setInUse(true);
          throw error;
        }
      },
      "Backed up.",
    );
  const fork = (snapshot?: string) => {
    let made: api.Session | undefined;
    const work = async () => (made = await api.fork(name, snapshot));
    void act("Forking…", work, `${name} was forked.`).then(() => {
      if (made) location.hash = linkTo(nameOf(made));
    });
  };
  return (
    <>
      {mayAct && (
        <div class="bar">
          <div class="actions">
            <button
              type="button"
              class="primary"
              disabled={!!busy}
              onClick={() => void backUp()}
            >
              Back up now
            </button>
            <button type="button" disabled={!!busy} onClick={() => setNaming(true)}>
              Take a snapshot
            </button>
          </div>
          <span role="status">{busy}</span>
        </div>
      )}
      <h2>Backups</h2>
      <Trouble text={backups.error} />
      {backups.value && !backups.value.length && <Empty>There is no backup yet.</Empty>}
      {backups.value && backups.value.length > 0 && (
        <Table
          label="Backups"
          head={
            <>
              <th scope="col">Taken</th>
              <th scope="col">Name</th>
              <th scope="col">Format</th>
              <th scope="col" class="number">
                Content
              </th>
              <th scope="col" class="number">
                Added
              </th>
              <ActionsColumn />
            </>
          }
        >
          {backups.value.map((backup) => (
            <tr key={backup.name}>
              <td>
                <When at={backup.taken_at} exact />
              </td>
              <th scope="row">
                <code title={backup.name}>{short(backup.name)}</code>
              </th>
              <td>{backup.format}</td>
              <td class="number">{bytes(backup.size)}</td>
              <td class="number">{bytes(backup.bytes)}</td>
              <td class="actions">
                {mayAct && (
                  <button
                    type="button"
                    disabled={!!busy}
                    aria-label={`Restore ${short(backup.name)}`}
                    onClick={() => setFrom({ backup: backup.name })}
                  >
                    Restore
                  </button>
                )}
              </td>
            </tr>
          ))}
        </Table>
      )}
      <h2>Snapshots</h2>
      <Trouble text={snapshots.error} />
      {snapshots.value && !snapshots.value.length && <Empty>There is no snapshot.</Empty>}
      {snapshots.value && snapshots.value.length > 0 && (
        <Table
          label="Snapshots"
          head={
            <>
              <th scope="col">Taken</th>
              <th scope="col">Name</th>
              <ActionsColumn />
            </>
          }
        >
          {snapshots.value.map((snapshot) => (
            <tr key={snapshot.name}>
              <td>
                <When at={snapshot.taken_at} exact />
              </td>
              <th scope="row">{snapshot.name}</th>
              <td class="actions">
                {mayAct && (
                  <>
                    <button
                      type="button"
                      disabled={!!busy}
                      aria-label={`Restore ${snapshot.name}`}
                      onClick={() => setFrom({ snapshot: snapshot.name })}
                    >
                      Restore
                    </button>
                    <button
                      type="button"
                      disabled={!!busy}
                      aria-label={`Fork ${snapshot.name}`}
                      onClick={() => fork(snapshot.name)}
                    >
                      Fork
                    </button>
                    <button
                      type="button"
                      class="danger"
                      disabled={!!busy}
                      aria-label={`Delete ${snapshot.name}`}
                      onClick={() =>
                        void act(
                          "Deleting…",
                          () => api.removeSnapshot(name, snapshot.name),
                          `${snapshot.name} was deleted.`,
                        )
                      }
                    >
                      Delete
                    </button>
                  </>
                )}
              </td>
            </tr>
          ))}
        </Table>
      )}
      {from && (
        <Dialog
          title={`Restore ${name}?`}
          action="Restore"
          danger
          onClose={() => setFrom(null)}
          onSubmit={(form) =>
            act(
              "Restoring…",
              async () => {
                if (form.has("force")) await api.stop(name, true);
                await api.restore(name, from);
              },
              `${name} was restored.`,
            )
          }
        >
          <p>
            Its files become what <code>{from.backup ? short(from.backup) : from.snapshot}</code> has.
            {session.unsaved && (
              <strong>
                {" "}
                It has changes that are in no backup: they are backed up first, and lost where there
                is no place for backups.
              </strong>
            )}
          </p>
          <label class="check">
            <input type="checkbox" name="force" /> end what runs in it first
          </label>
        </Dialog>
      )}
      {inUse && (
        <Dialog
          title={`${name} is in use`}
          action="End it and back up"
          danger
          onClose={() => setInUse(false)}
          onSubmit={async () => {
            if (await perform(() => api.stop(name, true))) await backUp();
          }}
        >
          <p>What runs in it has to end before it is backed up.</p>
        </Dialog>
      )}
      {naming && (
        <Dialog
          title="Take a snapshot"
          action="Take"
          onClose={() => setNaming(false)}
          onSubmit={(form) => {
            const called = String(form.get("name"));
            return act("Taking…", () => api.takeSnapshot(name, called), `${called} was taken.`);
          }}
        >
          <p>The files as they are now, kept on this disk. It is no backup.</p>
          <Field label="Name">
            <input name="name" required autocomplete="off" />
          </Field>
        </Dialog>
      )}
    </>
  );
}
