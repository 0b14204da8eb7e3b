"""What denizen does not have is refused by its name."""

import pytest
from e2b import FileNotFoundException, SandboxException

from cases import covers, differs, refused

SECRETS = "501 denizen does not have secrets"


@refused(
    SECRETS,
    "Secret.create",
    "Secret.update",
    "Secret.get_info",
    "Secret.list",
    "SecretPaginator.next_items",
    "Secret.exists",
    "Secret.destroy",
)
@covers("Secret.fill", "Secret.iam_token")
async def test_secrets(sdk):
    for call in (
        sdk.Secret.create("A_SECRET", "value"),
        sdk.Secret.update("A_SECRET", "value"),
        sdk.Secret.get_info("A_SECRET"),
        sdk.Secret.exists("A_SECRET"),
        sdk.Secret.destroy("A_SECRET"),
        (await sdk.Secret.list()).next_items(),
    ):
        with pytest.raises(Exception, match="secrets"):
            await call
    # These two only write a text.
    assert "A_SECRET" in await sdk.Secret.fill("A_SECRET")
    assert await sdk.Secret.iam_token(audience="a", token_type="JWT-SVID")


async def test_identities_and_gateways(sdk):
    iam = {"tokens": {"aws": {"audience": "a", "token_type": "JWT-SVID"}}}
    with pytest.raises(SandboxException, match="iam"):
        await sdk.Sandbox.create("base", iam=iam)


@refused(
    "FileNotFoundException: there is no gateway in the sandbox; `denizen mcp` serves MCP",
    "Sandbox.get_mcp_token",
)
@differs("the address of a gateway that is not there; `denizen mcp` serves MCP", "Sandbox.get_mcp_url")
async def test_the_gateway(sdk, sandbox):
    with pytest.raises(Exception, match="(?i)mcp"):
        await sdk.Sandbox.create(mcp={"time": {}})
    assert sandbox.sandbox_id in await sandbox.get_mcp_url()
    # There is none in the sandbox: nobody has left a token there.
    with pytest.raises(FileNotFoundException):
        await sandbox.get_mcp_token()
