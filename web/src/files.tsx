// The files of a session: one folder at a time.

import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { perform, useLoaded } from "./live";
import { linkTo } from "./sessions";
import { ActionsColumn, bytes, Dialog, Empty, Field, Table, Trouble, When } from "./ui";

export function FilesTab({ session, path }: { session: string; path: string[] }) {
  const parts = path.filter(Boolean);
  const folder = parts.join("/");
  // Looking starts the session and is a use of it. So this is done when somebody asks for it or
  // comes back, not every few seconds: a page that was left open would never let it sleep.
  const { value, error, reload } = useLoaded(() => api.list(session, folder), [session, folder]);
  useEffect(() => {
    const look = () => void reload();
    addEventListener("focus", look);
    return () => removeEventListener("focus", look);
  }, [session, folder]);
  const input = useRef<HTMLInputElement>(null);
  const [over, setOver] = useState(false);
  const [making, setMaking] = useState(false);
  const [removing, setRemoving] = useState<api.Entry | null>(null);
  const [sent, setSent] = useState<{ name: string; part: number } | null>(null);
  const below = (name: string) => (folder ? `${folder}/${name}` : name);
  const link = (to: string[]) => linkTo(session, ["files", ...to.map(encodeURIComponent)].join("/"));

  const upload = async (files: File[]) => {
    for (const file of files) {
      setSent({ name: file.name, part: 0 });
      const progress = (part: number) => setSent({ name: file.name, part });
      const send = () => api.upload(session, below(file.name), file, progress);
      if (!(await perform(send, `${file.name} was uploaded.`))) break;
    }
    setSent(null);
    await reload();
  };
  const download = (entry: api.Entry) =>
    perform(async () => {
      const isFolder = entry.kind === "folder";
      const address = URL.createObjectURL(await api.download(session, below(entry.name), isFolder));
      const anchor = document.createElement("a");
      anchor.href = address;
      anchor.download = isFolder ? `${entry.name}.tar` : entry.name;
      anchor.click();
      // The browser has begun with it by then.
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
    });

  return (
    <section
      aria-label="Files"
      class={over ? "drop over" : "drop"}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        void upload([...(event.dataTransfer?.files ?? [])]);
      }}
    >
      <div class="bar">
        <nav aria-label="Folder" class="path">
          <a href={link([])} aria-current={parts.length ? undefined : "page"}>
            volume
          </a>
          {parts.map((part, at) => (
            <span key={at}>
              {" / "}
              <a
                href={link(parts.slice(0, at + 1))}
                aria-current={at === parts.length - 1 ? "page" : undefined}
              >
                {part}
              </a>
            </span>
          ))}
        </nav>
        <div class="actions">
          <button type="button" onClick={() => void reload()}>
            Look again
          </button>
          <button type="button" onClick={() => input.current?.click()}>
            Upload
          </button>
          <button type="button" onClick={() => setMaking(true)}>
            New folder
          </button>
        </div>
        <input
          ref={input}
          type="file"
          multiple
          hidden
          aria-label="Files to upload"
          onChange={(event) => {
            const chosen = [...(event.currentTarget.files ?? [])];
            event.currentTarget.value = "";
            void upload(chosen);
          }}
        />
      </div>
      {sent && (
        <label class="check">
          {sent.name}
          <progress value={sent.part} />
        </label>
      )}
      <Trouble text={error} />
      {value && !value.length && <Empty>The folder is empty. Files can be dropped here.</Empty>}
      {value && value.length > 0 && (
        <Table
          label="Files"
          head={
            <>
              <th scope="col">Name</th>
              <th scope="col" class="number">
                Size
              </th>
              <th scope="col">Mode</th>
              <th scope="col">Changed</th>
              <ActionsColumn />
            </>
          }
        >
          {value.map((entry) => (
            <tr key={entry.name}>
              <th scope="row">
                {entry.kind === "folder" ? (
                  <a href={link([...parts, entry.name])}>{entry.name}/</a>
                ) : (
                  entry.name
                )}
                {entry.target && <small> → {entry.target}</small>}
              </th>
              <td class="number">{entry.kind === "file" ? bytes(entry.size) : "–"}</td>
              <td>
                <code>{entry.permissions}</code>
              </td>
              <td>
                <When at={entry.modifiedAt} />
              </td>
              <td class="actions">
                {entry.kind !== "link" && (
                  <button
                    type="button"
                    aria-label={`Download ${entry.name}`}
                    onClick={() => void download(entry)}
                  >
                    Download
                  </button>
                )}
                <button
                  type="button"
                  class="danger"
                  aria-label={`Delete ${entry.name}`}
                  onClick={() => setRemoving(entry)}
                >
                  Delete
                </button>
              </td>
            </tr>
          ))}
        </Table>
      )}
      {making && (
        <Dialog
          title="New folder"
          action="Make"
          onClose={() => setMaking(false)}
          onSubmit={async (form) => {
            await perform(() => api.makeFolder(session, below(String(form.get("name")))));
            await reload();
          }}
        >
          <Field label="Name">
            <input name="name" required autocomplete="off" />
          </Field>
        </Dialog>
      )}
      {removing && (
        <Dialog
          title={`Delete ${removing.name}?`}
          action="Delete"
          danger
          onClose={() => setRemoving(null)}
          onSubmit={async () => {
            const { name } = removing;
            await perform(() => api.removePath(session, below(name)), `${name} was deleted.`);
            await reload();
          }}
        >
          {removing.kind === "folder" && <p>The folder and all that is in it.</p>}
        </Dialog>
      )}
    </section>
  );
}
