// Commands that were started through the daemon and run now.

import * as api from "./api";
import { perform, useLoaded } from "./live";
import { Empty, Table, Trouble } from "./ui";

export function ProcessesTab({ session }: { session: string }) {
  const { value, error, reload } = useLoaded(() => api.processes(session), [session], { every: 3000 });
  const send = (pid: number, name: "TERM" | "KILL") =>
    void perform(() => api.signal(session, pid, name), `${name} was sent to ${pid}.`).then(reload);
  return (
    <>
      <Trouble text={error} />
      {value && !value.length && <Empty>No command runs.</Empty>}
      {value && value.length > 0 && (
        <Table
          label="Processes"
          head={
            <>
              <th scope="col" class="number">
                PID
              </th>
              <th scope="col">Command</th>
              <th scope="col">Tag</th>
              <th scope="col">
                <span class="hidden">Actions</span>
              </th>
            </>
          }
        >
          {value.map((process) => (
            <tr key={process.pid}>
              <td class="number">{process.pid}</td>
              <td>
                <code>{process.command}</code>
              </td>
              <td>{process.tag ?? "–"}</td>
              <td class="actions">
                <button
                  type="button"
                  aria-label={`Terminate ${process.pid}`}
                  onClick={() => send(process.pid, "TERM")}
                >
                  Terminate
                </button>
                <button
                  type="button"
                  class="danger"
                  aria-label={`Kill ${process.pid}`}
                  onClick={() => send(process.pid, "KILL")}
                >
                  Kill
                </button>
              </td>
            </tr>
          ))}
        </Table>
      )}
    </>
  );
}
