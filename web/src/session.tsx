// One session: what it is, what happened to it, and what is in it.

import type { ComponentChildren } from "preact";
import * as api from "./api";
import { BackupsTab } from "./backups";
import { EventList } from "./events";
import { FilesTab } from "./files";
import { happened, perform, useLoaded, useTold } from "./live";
import { ProcessesTab } from "./processes";
import { Actions, isUp, linkTo, nameOf, Saved } from "./sessions";
import { TerminalTab } from "./terminal";
import { bytes, Empty, Heading, processorTime, State, Trouble, When } from "./ui";

const TABS = [
  ["", "Overview"],
  ["terminal", "Terminal"],
  ["files", "Files"],
  ["backups", "Backups"],
  ["processes", "Processes"],
] as const;

export function SessionPage(props: { me: api.Me; name: string; tab: string; rest: string[] }) {
  const { me, name, tab, rest } = props;
  const { value, error, reload } = useLoaded(() => api.inspect(name), [name], {
    every: 5000,
    events: (event) => name === event.name || name === event.session,
  });
  // To look into a session that is not running would start it: that is asked for.
  const within = (children: ComponentChildren) => {
    if (!value) return null;
    if (me.scope === "read") return <Empty>This needs a key of scope operate.</Empty>;
    if (isUp(value)) return children;
    return (
      <Empty>
        The session is {value.state}.{" "}
        <button
          type="button"
          onClick={() => void perform(() => api.start(name), `${name} has started.`).then(reload)}
        >
          Start it
        </button>
      </Empty>
    );
  };
  return (
    <>
      <div class="bar">
        <Heading>{name}</Heading>
        {value && <State of={value.state} />}
        {value && me.scope !== "read" && (
          <div class="actions">
            <Actions session={value} reload={reload} />
          </div>
        )}
      </div>
      <nav class="tabs" aria-label="Session">
        {TABS.map(([to, text]) => (
          <a key={to} href={linkTo(name, to)} aria-current={tab === to ? "page" : undefined}>
            {text}
          </a>
        ))}
      </nav>
      <Trouble text={error} />
      {value && tab === "" && <Overview session={value} />}
      {tab === "terminal" && within(<TerminalTab session={name} />)}
      {tab === "files" && within(<FilesTab session={name} path={rest} />)}
      {value && tab === "backups" && <BackupsTab me={me} session={value} reload={reload} />}
      {value && tab === "processes" && <ProcessesTab me={me} session={name} />}
    </>
  );
}

function Overview({ session }: { session: api.Session }) {
  const events = useTold(happened).all.filter((event) => event.session === session.id);
  // What is known from before the daemon was started.
  const known = [
    { at: session.created_at, event: "created" },
    { at: session.backup_taken_at, event: "backed_up", backup: session.backup },
    { at: session.backup_failed_at, event: "failed", operation: "backup", error: session.backup_failure },
  ];
  const past = known.filter(
    (it): it is { at: number; event: string } =>
      typeof it.at === "number" && !events.some((event) => event.event === it.event),
  );
  const all = [...events, ...past.map((it) => ({ ...it, session: session.id, id: it.event }))];
  all.sort((a, b) => b.at - a.at);
  const usage = session.usage ?? {};
  const facts: [string, ComponentChildren][] = [
    ["UUID", <code>{session.id}</code>],
    ["Name", session.name ?? "–"],
    ["Isolation", session.isolation],
    ["Image", session.image ?? "–"],
    ["In use", session.in_use ? `yes${session.waiting ? `, ${session.waiting} waiting` : ""}` : "no"],
    ["Last used", <When at={session.last_used} />],
    ["Memory", bytes(usage.memory_bytes)],
    ["CPU", processorTime(usage.cpu_microseconds)],
    ["Processes", usage.processes ?? "–"],
    [
      "Disk",
      `${bytes(session.disk_used)}${session.disk_limit ? ` of ${bytes(session.disk_limit)}` : ""}`,
    ],
    ["Changes", <Saved of={session} />],
    ["Latest backup", <When at={session.backup_taken_at} />],
    ["Next backup", <When at={session.backup_due_at} />],
  ];
  return (
    <>
      {session.backup_failure && <Trouble text={`The last backup failed: ${session.backup_failure}`} />}
      {session.last_failure && <Trouble text={session.last_failure} />}
      <dl class="facts">
        {facts.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      <h2>Timeline of {nameOf(session)}</h2>
      <EventList events={all} />
    </>
  );
}
