// All sessions in one table.

import { useState } from "preact/hooks";
import * as api from "./api";
import { perform, useLoaded } from "./live";
import { ActionsColumn, bytes, Dialog, Empty, Field, Heading, processorTime, span, State, Table, Trouble, When } from "./ui";

export const nameOf = (session: api.Session) => session.name ?? session.id;
export const linkTo = (session: string, tab = "") =>
  `#/sessions/${encodeURIComponent(session)}${tab && `/${tab}`}`;
export const isUp = (session: api.Session) => ["active", "frozen"].includes(session.state);

export function SessionsPage({ me }: { me: api.Me }) {
  const { value, error, reload } = useLoaded(api.sessions, [], { every: 5000, events: () => true });
  const [filter, setFilter] = useState("");
  const [state, setState] = useState("");
  const [unsaved, setUnsaved] = useState(false);
  const [creating, setCreating] = useState(false);
  const all = value ?? [];
  const states = [...new Set(all.map((session) => session.state))].sort();
  const shown = all.filter(
    (session) =>
      (!filter || `${session.name ?? ""} ${session.id}`.includes(filter)) &&
      (!state || session.state === state) &&
      (!unsaved || session.unsaved),
  );
  return (
    <>
      <div class="bar">
        <Heading>Sessions</Heading>
        {me.scope !== "read" && (
          <button type="button" class="primary" onClick={() => setCreating(true)}>
            New session
          </button>
        )}
      </div>
      <form class="filters" role="search" aria-label="Sessions" onSubmit={(it) => it.preventDefault()}>
        <Field label="Name">
          <input type="search" value={filter} onInput={(it) => setFilter(it.currentTarget.value)} />
        </Field>
        <Field label="State">
          <select value={state} onChange={(it) => setState(it.currentTarget.value)}>
            <option value="">all</option>
            {states.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </Field>
        <label class="check">
          <input type="checkbox" checked={unsaved} onChange={(it) => setUnsaved(it.currentTarget.checked)} />
          unsaved only
        </label>
        <output>
          {shown.length} of {all.length}
        </output>
      </form>
      <Trouble text={error} />
      {value && !shown.length && (
        <Empty>{all.length ? "No session is like that." : "There is no session yet."}</Empty>
      )}
      {shown.length > 0 && (
        <Table
          label="Sessions"
          head={
            <>
              <th scope="col">Name</th>
              <th scope="col">State</th>
              <th scope="col">Isolation</th>
              <th scope="col">Age</th>
              <th scope="col">Used</th>
              <th scope="col" class="number">
                Memory
              </th>
              <th scope="col" class="number">
                CPU
              </th>
              <th scope="col" class="number">
                Disk
              </th>
              <th scope="col">Changes</th>
              <ActionsColumn />
            </>
          }
        >
          {shown.map((session) => (
            <tr key={session.id}>
              <th scope="row">
                <a href={linkTo(nameOf(session))}>{nameOf(session)}</a>
              </th>
              <td>
                <State of={session.state} />
                {session.operation && <small> {session.operation}…</small>}
              </td>
              <td>{session.isolation}</td>
              <td>{span(Date.now() / 1000 - session.created_at)}</td>
              <td>{session.in_use ? "now" : <When at={session.last_used} />}</td>
              <td class="number">{bytes(session.usage?.memory_bytes)}</td>
              <td class="number">{processorTime(session.usage?.cpu_microseconds)}</td>
              <td class="number">{bytes(session.disk_used)}</td>
              <td>
                <Saved of={session} />
              </td>
              <td class="actions">
                {me.scope !== "read" && <Actions session={session} reload={reload} short />}
              </td>
            </tr>
          ))}
        </Table>
      )}
      {creating && <Create onClose={() => setCreating(false)} />}
    </>
  );
}

export function Saved({ of }: { of: api.Session }) {
  if (of.backup_failure) return <span class="bad">backup failed</span>;
  return of.unsaved ? <span class="warn">unsaved</span> : <>saved</>;
}

function Create({ onClose }: { onClose: () => void }) {
  return (
    <Dialog
      title="New session"
      action="Create"
      onClose={onClose}
      onSubmit={async (form) => {
        const name = String(form.get("name"));
        const image = String(form.get("image")).trim();
        if (await perform(() => api.create(name, image || undefined), `Session ${name} is there.`)) {
          location.hash = linkTo(name);
        }
      }}
    >
      <Field label="Name">
        <input name="name" required pattern="[A-Za-z0-9][A-Za-z0-9._\-]*" autocomplete="off" />
      </Field>
      <Field label="Image" hint="Empty: the pool's own root. denizen image ls lists what there is.">
        <input name="image" autocomplete="off" />
      </Field>
    </Dialog>
  );
}

/** What can be done to a session as a whole. */
export function Actions(props: {
  session: api.Session;
  reload: () => Promise<void>;
  short?: boolean;
}) {
  const { session, reload, short } = props;
  const [asking, setAsking] = useState<"" | "stop" | "remove">("");
  const [busy, setBusy] = useState(false);
  const name = nameOf(session);
  const act = async (work: () => Promise<unknown>, done: string) => {
    setBusy(true);
    const went = await perform(work, done);
    setBusy(false);
    await reload();
    return went;
  };
  return (
    <>
      {isUp(session) ? (
        <button type="button" disabled={busy} aria-label={`Stop ${name}`} onClick={() => setAsking("stop")}>
          Stop
        </button>
      ) : (
        <button
          type="button"
          disabled={busy}
          aria-label={`Start ${name}`}
          onClick={() => act(() => api.start(name), `${name} has started.`)}
        >
          Start
        </button>
      )}
      <button
        type="button"
        disabled={busy}
        aria-label={`Fork ${name}`}
        onClick={() => {
          let made: api.Session | undefined;
          void act(async () => (made = await api.fork(name)), `${name} was forked.`).then(() => {
            if (made) location.hash = linkTo(nameOf(made));
          });
        }}
      >
        Fork
      </button>
      <button
        type="button"
        class="danger"
        disabled={busy}
        aria-label={`Remove ${name}`}
        onClick={() => setAsking("remove")}
      >
        Remove
      </button>
      {asking === "stop" && (
        <Dialog
          title={`Stop ${name}?`}
          action="Stop"
          onClose={() => setAsking("")}
          onSubmit={(form) => void act(() => api.stop(name, form.has("force")), `${name} has stopped.`)}
        >
          <p>Its processes end, its files stay.</p>
          <label class="check">
            <input type="checkbox" name="force" /> also if something runs in it
          </label>
        </Dialog>
      )}
      {asking === "remove" && (
        <Dialog
          title={`Remove ${name}?`}
          action="Remove"
          danger
          onClose={() => setAsking("")}
          onSubmit={async (form) => {
            const removed = await act(() => api.remove(name, form.has("force")), `${name} was removed.`);
            if (removed && !short) location.hash = "#/";
          }}
        >
          <p>
            Its local files and snapshots are deleted; backups stay.
            {session.unsaved && <strong> It has changes that are in no backup.</strong>}
          </p>
          <label class="check">
            <input type="checkbox" name="force" /> also if something runs in it
          </label>
        </Dialog>
      )}
    </>
  );
}
