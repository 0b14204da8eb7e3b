// What happens to sessions, as it happens.

import { useState } from "preact/hooks";
import type { LifeEvent } from "./api";
import { happened, useTold } from "./live";
import { linkTo } from "./sessions";
import { bytes, Empty, Field, Heading, short, When } from "./ui";

/** The event in words. */
function words(event: LifeEvent): string {
  const text = (name: string) => String(event[name] ?? "");
  switch (event.event) {
    case "progress":
      return `${text("operation")}: ${bytes(Number(event.bytes))}, ${text("files")} files`;
    case "failed":
      return `${text("operation")} failed: ${text("error")}`;
    case "denied":
      return `denied ${text("host")}:${text("port")} by ${text("rule")}`;
    case "limit_reached":
      return `${text("resource")}: ${bytes(Number(event.used))} of ${bytes(Number(event.limit))}`;
    case "lagged":
      return `${text("missed")} events were missed`;
    default: {
      const detail = event.backup ? short(String(event.backup)) : event.snapshot;
      return `${event.event.replaceAll("_", " ")}${detail ? ` ${String(detail)}` : ""}`;
    }
  }
}

const isBad = (event: LifeEvent) => ["failed", "denied", "limit_reached", "missing"].includes(event.event);

export function EventList({ events, named }: { events: LifeEvent[]; named?: boolean }) {
  if (!events.length) return <Empty>Nothing has happened since the daemon was started.</Empty>;
  return (
    <ol class="events">
      {events.map((event) => (
        <li key={event.id} class={isBad(event) ? "bad" : undefined}>
          <When at={event.at} exact />
          {named && (
            <a href={linkTo(event.name ?? event.session)}>{event.name ?? event.session.slice(0, 8)}</a>
          )}
          <span>{words(event)}</span>
        </li>
      ))}
    </ol>
  );
}

export function EventsPage() {
  const events = useTold(happened).all;
  const [filter, setFilter] = useState("");
  const [progress, setProgress] = useState(false);
  const shown = events.filter(
    (event) =>
      (progress || event.event !== "progress") &&
      (!filter || `${event.name ?? ""} ${event.session} ${words(event)}`.includes(filter)),
  );
  return (
    <>
      <div class="bar">
        <Heading>Events</Heading>
      </div>
      <form class="filters" role="search" aria-label="Events" onSubmit={(it) => it.preventDefault()}>
        <Field label="Session or kind">
          <input type="search" value={filter} onInput={(it) => setFilter(it.currentTarget.value)} />
        </Field>
        <label class="check">
          <input type="checkbox" checked={progress} onChange={(it) => setProgress(it.currentTarget.checked)} />
          progress too
        </label>
      </form>
      <div role="log" aria-label="Events" aria-live="polite">
        <EventList events={shown} named />
      </div>
    </>
  );
}
