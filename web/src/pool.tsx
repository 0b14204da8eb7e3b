// How the pool is.

import * as api from "./api";
import { useLoaded } from "./live";
import { Empty, Heading, Table, Trouble } from "./ui";

export function PoolPage({ me }: { me: api.Me }) {
  const ready = useLoaded(api.ready, [], { every: 5000 });
  // The figures of the whole are not for who sees some sessions only.
  const metrics = useLoaded(() => (me.sessions ? Promise.resolve([]) : api.metrics()), [], {
    every: 5000,
  });
  const all = metrics.value ?? [];
  const states = all.filter((metric) => metric.name === "denizen_sessions");
  const others = all.filter((metric) => metric.name !== "denizen_sessions");
  return (
    <>
      <div class="bar">
        <Heading>Pool</Heading>
        {ready.value && (
          <span class={`state ${ready.value.ok ? "active" : "missing"}`}>
            {ready.value.ok ? "ready" : "not ready"}
          </span>
        )}
      </div>
      <Trouble text={ready.error ?? (ready.value && !ready.value.ok ? ready.value.detail : undefined)} />
      <Trouble text={metrics.error} />
      {me.sessions && <Empty>The pool's figures need a key for all sessions.</Empty>}
      {states.length > 0 && (
        <>
          <h2>Sessions by state</h2>
          <dl class="facts">
            {states.map((metric) => (
              <div key={metric.labels}>
                <dt>{/"(.*)"/.exec(metric.labels)?.[1]}</dt>
                <dd>{metric.value}</dd>
              </div>
            ))}
          </dl>
        </>
      )}
      {others.length > 0 && (
        <>
          <h2>Figures</h2>
          <Table
            label="Figures"
            head={
              <>
                <th scope="col">Metric</th>
                <th scope="col" class="number">
                  Value
                </th>
                <th scope="col">Meaning</th>
              </>
            }
          >
            {others.map((metric) => (
              <tr key={metric.name + metric.labels}>
                <th scope="row">
                  <code>
                    {metric.name}
                    {metric.labels && `{${metric.labels}}`}
                  </code>
                </th>
                <td class="number">{Number(metric.value.toPrecision(6)).toLocaleString()}</td>
                <td>{metric.help}</td>
              </tr>
            ))}
          </Table>
        </>
      )}
    </>
  );
}
