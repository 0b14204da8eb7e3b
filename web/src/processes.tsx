// Commands that were started through the daemon: those that run, and those that ended lately.

import * as api from "./api";
import { perform, useLoaded } from "./live";
import { ActionsColumn, Empty, Table, Trouble, When } from "./ui";

export function ProcessesTab({ me, session }: { me: api.Me; session: string }) {
  const { value, error, reload } = useLoaded(() => api.processes(session), [session], { every: 3000 });
  const send = (pid: number, number: number) =>
    void perform(() => api.signal(session, pid, number), `Signal ${number} was sent to ${pid}.`).then(reload);
  return (
    <>
      <Trouble text={error} />
      {value && !value.length && <Empty>No command runs, and none has ended lately.</Empty>}
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
              <th scope="col">Started</th>
              <th scope="col">State</th>
              <ActionsColumn />
            </>
          }
        >
          {value.map((process) => (
            <tr key={process.pid}>
              <td class="number">{process.pid}</td>
              <td class="wrap">
                <code>{process.command.join(" ")}</code>
              </td>
              <td>{process.tag ?? "–"}</td>
              <td>
                <When at={process.started_at} />
              </td>
              <td>{process.ended ? `ended: ${process.ended.code}` : "runs"}</td>
              <td class="actions">
                {me.scope !== "read" && !process.ended && (
                  <>
                    <button
                      type="button"
                      aria-label={`Terminate ${process.pid}`}
                      onClick={() => send(process.pid, 15)}
                    >
                      Terminate
                    </button>
                    <button
                      type="button"
                      class="danger"
                      aria-label={`Kill ${process.pid}`}
                      onClick={() => send(process.pid, 9)}
                    >
                      Kill
                    </button>
                  </>
                )}
              </td>
            </tr>
          ))}
        </Table>
      )}
    </>
  );
}
