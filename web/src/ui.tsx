// What pages are made of: dialogs, tables, and how numbers and times are written.

import { cloneElement, type ComponentChildren, type VNode } from "preact";
import { useId, useLayoutEffect, useRef } from "preact/hooks";

export function bytes(count?: number | null): string {
  if (count === undefined || count === null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit++;
  }
  return `${unit && count < 10 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

/** A backup's name where there is little room: those of a repository are long and random. */
export const short = (name: string) => (/^[0-9a-f]{64}$/.test(name) ? name.slice(0, 12) : name);

export function span(seconds: number): string {
  const past = Math.abs(seconds);
  if (past < 60) return `${Math.round(past)} s`;
  if (past < 3600) return `${Math.round(past / 60)} min`;
  if (past < 48 * 3600) return `${Math.round(past / 3600)} h`;
  return `${Math.round(past / 86400)} d`;
}

/** Processor time, of which little is told exactly. */
export function processorTime(microseconds?: number | null): string {
  if (microseconds === undefined || microseconds === null) return "–";
  const seconds = microseconds / 1e6;
  return seconds < 60 ? `${seconds.toFixed(seconds < 10 ? 2 : 0)} s` : span(seconds);
}

/** A time as the API tells it (seconds since 1970, or RFC 3339), as how long ago it is. */
export function When({ at, exact }: { at?: number | string | null; exact?: boolean }) {
  if (at === undefined || at === null) return <>–</>;
  const date = new Date(typeof at === "number" ? at * 1000 : at);
  const past = (Date.now() - date.getTime()) / 1000;
  const relative = past < 0 ? `in ${span(past)}` : `${span(past)} ago`;
  const text = date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
  return (
    <time dateTime={date.toISOString()} title={text}>
      {exact ? text : relative}
    </time>
  );
}

/** A table that scrolls by itself where the window is narrow. */
export function Table(props: { label: string; head: ComponentChildren; children: ComponentChildren }) {
  return (
    <div class="table" role="region" aria-label={props.label} tabIndex={0}>
      <table>
        <thead>
          <tr>{props.head}</tr>
        </thead>
        <tbody>{props.children}</tbody>
      </table>
    </div>
  );
}

/** The head of a column of buttons, which needs no words for those who see it. */
export function ActionsColumn() {
  return (
    <th scope="col">
      <span class="hidden">Actions</span>
    </th>
  );
}

export function State({ of }: { of: string }) {
  return <span class={`state ${of}`}>{of}</span>;
}

/** A modal dialog; the browser keeps the focus in it and gives it back. */
export function Dialog(props: {
  title: string;
  action: string;
  danger?: boolean;
  onClose: () => void;
  onSubmit: (form: FormData) => void | Promise<void>;
  children?: ComponentChildren;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  // At once: what is typed next is for the dialog.
  useLayoutEffect(() => {
    const back = document.activeElement;
    dialog.current?.showModal();
    return () => {
      // The element that had the focus may have been drawn anew.
      if (back instanceof HTMLElement && back.isConnected) back.focus();
      else document.querySelector<HTMLElement>("main h1")?.focus();
    };
  }, []);
  return (
    <dialog ref={dialog} aria-labelledby="dialog-title" onClose={props.onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          const form = new FormData(event.currentTarget as HTMLFormElement);
          props.onClose();
          void props.onSubmit(form);
        }}
      >
        <h2 id="dialog-title">{props.title}</h2>
        {props.children}
        <div class="buttons">
          <button type="button" onClick={props.onClose}>
            Cancel
          </button>
          <button type="submit" class={props.danger ? "danger" : "primary"}>
            {props.action}
          </button>
        </div>
      </form>
    </dialog>
  );
}

/** A control with its name, and perhaps a hint, which is read after the name. */
export function Field(props: { label: string; hint?: string; children: VNode }) {
  const id = useId();
  const hint = props.hint && `${id}-hint`;
  return (
    <div class="field">
      <label for={id}>{props.label}</label>
      {cloneElement(props.children, { id, "aria-describedby": hint || undefined })}
      {hint && <small id={hint}>{props.hint}</small>}
    </div>
  );
}

export function Empty({ children }: { children: ComponentChildren }) {
  return <p class="empty">{children}</p>;
}

export function Trouble({ text }: { text?: string }) {
  return text ? (
    <p class="trouble" role="alert">
      {text}
    </p>
  ) : null;
}

/** The heading of a page, which gets the focus when the page is opened. */
export function Heading({ children }: { children: ComponentChildren }) {
  return <h1 tabIndex={-1}>{children}</h1>;
}
