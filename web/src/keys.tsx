// Who may use the daemon.

import { useState } from "preact/hooks";
import * as api from "./api";
import { complain, perform, say, useLoaded } from "./live";
import { ActionsColumn, Dialog, Empty, Field, Heading, Table, Trouble, When } from "./ui";

export function KeysPage() {
  const { value, error, reload } = useLoaded(api.keys, [], { every: 10_000 });
  const [creating, setCreating] = useState(false);
  const [revoking, setRevoking] = useState<api.Key | null>(null);
  const [made, setMade] = useState<(api.Key & { key: string }) | null>(null);
  const create = async (form: FormData) => {
    const days = Number(form.get("days"));
    const asked = {
      name: String(form.get("name")),
      scope: String(form.get("scope")) as api.Scope,
      sessions: String(form.get("sessions")) || undefined,
      expires_in_seconds: days ? Math.round(days * 86400) : undefined,
    };
    try {
      setMade(await api.createKey(asked));
    } catch (problem) {
      complain(problem);
    }
    await reload();
  };
  return (
    <>
      <div class="bar">
        <Heading>Keys</Heading>
        <button type="button" class="primary" onClick={() => setCreating(true)}>
          New key
        </button>
      </div>
      <div role="status">
        {made && (
          <div class="notice">
            <p>
              The key <strong>{made.name}</strong>. It is shown this once only.
            </p>
            <p>
              <code class="secret">{made.key}</code>
            </p>
            <div class="buttons">
              <button
                type="button"
                onClick={() =>
                  void perform(() => navigator.clipboard.writeText(made.key), "The key was copied.")
                }
              >
                Copy
              </button>
              <button type="button" onClick={() => setMade(null)}>
                Done
              </button>
            </div>
          </div>
        )}
      </div>
      <Trouble text={error} />
      {value && !value.length && <Empty>There is no key.</Empty>}
      {value && value.length > 0 && (
        <Table
          label="Keys"
          head={
            <>
              <th scope="col">Name</th>
              <th scope="col">Id</th>
              <th scope="col">Scope</th>
              <th scope="col">Sessions</th>
              <th scope="col">Made</th>
              <th scope="col">Expires</th>
              <th scope="col">Last used</th>
              <ActionsColumn />
            </>
          }
        >
          {value.map((key) => (
            <tr key={key.id}>
              <th scope="row">{key.name}</th>
              <td>
                <code>{key.id}</code>
              </td>
              <td>{key.scope}</td>
              <td>{key.sessions ? `${key.sessions}…` : "all"}</td>
              <td>
                <When at={key.created_at} />
              </td>
              <td>{key.expires_at ? <When at={key.expires_at} /> : "never"}</td>
              <td>{key.last_used_at ? <When at={key.last_used_at} /> : "never"}</td>
              <td class="actions">
                <button
                  type="button"
                  class="danger"
                  aria-label={`Revoke ${key.name}`}
                  onClick={() => setRevoking(key)}
                >
                  Revoke
                </button>
              </td>
            </tr>
          ))}
        </Table>
      )}
      {creating && (
        <Dialog title="New key" action="Create" onClose={() => setCreating(false)} onSubmit={create}>
          <Field label="Name" hint="What it is for.">
            <input name="name" required autocomplete="off" />
          </Field>
          <Field label="Scope">
            <select name="scope">
              <option value="operate">operate: use sessions</option>
              <option value="read">read: see sessions, not their files</option>
              <option value="admin">admin: all</option>
            </select>
          </Field>
          <Field label="Sessions" hint="Only those whose names begin with this. Empty: all.">
            <input name="sessions" autocomplete="off" />
          </Field>
          <Field label="Days" hint="How long it is good. Empty: until it is revoked.">
            <input name="days" type="number" min="1" max="36500" />
          </Field>
        </Dialog>
      )}
      {revoking && (
        <Dialog
          title={`Revoke ${revoking.name}?`}
          action="Revoke"
          danger
          onClose={() => setRevoking(null)}
          onSubmit={async () => {
            const { id, name } = revoking;
            try {
              await api.revokeKey(id);
              say(`${name} was revoked.`);
              // If it was ours, this finds out.
              await reload();
            } catch (problem) {
              complain(problem);
            }
          }}
        >
          <p>What is being done with it ends at once.</p>
        </Dialog>
      )}
    </>
  );
}
